"""Decoders with Llama's module names and something of their own: fused gate and up, other norms, other MLPs."""

from model_policies.llama import ATTENTION, GATED_MLP, GROUPS, NORMED_ATTENTION, NORMS, TASK_HEADS
from tp_plugin.policy import MLP, Attention, Blocks, Policy, Vocabulary, even, kv, q

FUSED_MLP = MLP(
    "layers.*.mlp",
    columns={"gate_up_proj": Blocks(("even", "even"))},
    row={"down_proj": even},
    inputs=("hidden_states",),
)
UP_DOWN_MLP = MLP("layers.*.mlp", columns={"up_proj": even}, row={"down_proj": even})
# its forward reads all counts from itself
COUNTED_ATTENTION = Attention(
    "layers.*.self_attn",
    local_sizes={**GROUPS, "num_heads": "q_heads", "num_key_value_heads": "kv_heads", "hidden_size": "q_width"},
)
# q and k are normalised over their whole width
WIDE_NORMED_ATTENTION = Attention("layers.*.self_attn", sharded_norms={"q_norm": q, "k_norm": kv}, local_sizes=GROUPS)
# one norm weight per head
HEAD_NORMED_ATTENTION = Attention(
    "layers.*.self_attn", tensors={"q_norm?": (q, 0), "k_norm?": (kv, 0)}, local_sizes=GROUPS
)
POST_NORMS = ("layers.*.post_attention_layernorm", "layers.*.post_feedforward_layernorm", "norm")

POLICIES = (
    Policy(("ernie4_5",), (ATTENTION, GATED_MLP), Vocabulary(), NORMS),
    Policy(
        ("stablelm",),
        (COUNTED_ATTENTION, GATED_MLP),
        Vocabulary(),
        (*NORMS, "score"),
        parallel_residual="layers.*",
        parallel_residual_if=lambda config: config.use_parallel_residual,
    ),
    Policy(
        ("cohere", "cohere2"),
        (HEAD_NORMED_ATTENTION, GATED_MLP),
        Vocabulary(),
        ("layers.*.input_layernorm", "norm"),
        parallel_residual="layers.*",
    ),
    Policy(("glm",), (ATTENTION, FUSED_MLP), Vocabulary(), (*NORMS, "score")),
    Policy(
        ("glm4",),
        (ATTENTION, FUSED_MLP),
        Vocabulary(),
        (*NORMS, "layers.*.post_self_attn_layernorm", "layers.*.post_mlp_layernorm", "score"),
    ),
    Policy(("nemotron",), (ATTENTION, UP_DOWN_MLP), Vocabulary(), (*NORMS, *TASK_HEADS)),
    Policy(("olmo2", "olmo3"), (WIDE_NORMED_ATTENTION, GATED_MLP), Vocabulary(), (*POST_NORMS, "score")),
    Policy(("exaone4",), (NORMED_ATTENTION, GATED_MLP), Vocabulary(), (*POST_NORMS, *TASK_HEADS)),
)
