"""Mixtures of experts: attention and dense MLPs as in the dense models, experts split inside, routers replicated."""

from model_policies.decoders import WIDE_NORMED_ATTENTION
from model_policies.llama import ATTENTION, GROUPS, NORMED_ATTENTION, NORMS, TASK_HEADS
from tp_plugin.policy import MLP, Attention, Experts, Policy, Vocabulary, aligned, aligned_pairs, q

EXPERTS = Experts("layers.*.mlp.experts", optional=True)
# in some layers of these models there is a dense MLP in the place of the experts
DENSE_MLP = MLP("layers.*.mlp", requires="gate_proj", optional=True)
ROUTER = "layers.*.mlp.gate"

POLICIES = (
    Policy(("mixtral",), (ATTENTION, Experts("layers.*.mlp.experts")), Vocabulary(), (*NORMS, ROUTER, *TASK_HEADS)),
    Policy(
        ("qwen2_moe",),
        (ATTENTION, DENSE_MLP, EXPERTS, MLP("layers.*.mlp.shared_expert", optional=True)),
        Vocabulary(),
        (*NORMS, ROUTER, "layers.*.mlp.shared_expert_gate", *TASK_HEADS),
    ),
    Policy(("qwen3_moe",), (NORMED_ATTENTION, DENSE_MLP, EXPERTS), Vocabulary(), (*NORMS, ROUTER, *TASK_HEADS)),
    Policy(
        ("olmoe",),
        (WIDE_NORMED_ATTENTION, Experts("layers.*.mlp.experts")),
        Vocabulary(),
        (*NORMS, ROUTER),
    ),
    Policy(
        ("phimoe",),
        (ATTENTION, Experts("layers.*.mlp.experts")),
        Vocabulary(),
        (*NORMS, "layers.*.mlp.router", "score"),
    ),
    Policy(
        ("granitemoe",),
        (ATTENTION, Experts("layers.*.block_sparse_moe.experts")),
        Vocabulary(),
        (*NORMS, "layers.*.block_sparse_moe.router"),
    ),
    Policy(
        ("gpt_oss",),
        (
            Attention("layers.*.self_attn", tensors={"sinks": (q, 0)}, local_sizes=GROUPS),
            Experts(
                inputs=("hidden_states", "routing_weights"),
                tensors={
                    "gate_up_proj": (aligned_pairs, 2),
                    "gate_up_proj_bias": (aligned_pairs, 1),
                    "down_proj": (aligned, 1),
                },
                bias_shards=("down_proj_bias",),
                index="router_indices",
                eager_supports_ep=False,
            ),
        ),
        Vocabulary(),
        (*NORMS, "layers.*.mlp.router", "score"),
    ),
    Policy(
        ("llama4_text",),
        (
            Attention("layers.*.self_attn", local_sizes={**GROUPS, "num_attention_heads": "q_heads"}),
            MLP("layers.*.feed_forward", requires="gate_proj", optional=True),
            MLP("layers.*.feed_forward.shared_expert", optional=True),
            Experts(
                "layers.*.feed_forward.experts",
                inputs=("hidden_states",),  # weighted before the experts, all of which see all tokens
                tensors={"gate_up_proj": (EXPERTS.tensors["gate_up_proj"][0], 2), "down_proj": (aligned, 1)},
                index="",
                optional=True,
            ),
        ),
        Vocabulary(),
        (*NORMS, "layers.*.feed_forward.router"),
    ),
)
