"""DeepSeek's multi-head latent attention: the latents are computed whole on every rank, heads split behind them.

The block begins at the latents, not at the hidden states: their gradients are the smaller thing to sum.
"""

from model_policies.llama import NORMS
from model_policies.moe import DENSE_MLP, EXPERTS, ROUTER
from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, q

LATENT_ATTENTION = Attention(
    "layers.*.self_attn",
    columns={"q_proj?": q, "q_b_proj?": q, "kv_b_proj": q},
    row={"o_proj": q},
    kv_heads="num_attention_heads",
    inputs=(),
    input_of=("q_proj?", "q_b_proj?"),
    output_of=("kv_a_proj_with_mqa",),  # the latent and the rotary part of the key, one for all heads
    partial=("kv_a_layernorm",),
    replicated=("q_a_proj?", "q_a_layernorm?", "kv_a_proj_with_mqa"),
    local_sizes={"num_heads": "q_heads"},
)

POLICIES = (
    Policy(
        ("deepseek_v2", "deepseek_v3"),
        (LATENT_ATTENTION, DENSE_MLP, EXPERTS, MLP("layers.*.mlp.shared_experts", optional=True)),
        Vocabulary(),
        (*NORMS, ROUTER, "score"),
    ),
)
