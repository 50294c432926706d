"""Phi: a parallel residual, biases everywhere. Phi-3 and Phi-4: fused ``[q|k|v]`` and ``[gate|up]``."""

from model_policies.decoders import FUSED_MLP
from model_policies.llama import GROUPS, NORMS
from tp_plugin.policy import MLP, Attention, Blocks, Policy, Vocabulary, even, q

POLICIES = (
    Policy(
        ("phi",),
        (
            Attention(
                "layers.*.self_attn",
                row={"dense": q},
                partial=("q_layernorm?", "k_layernorm?"),
                local_sizes=GROUPS,
            ),
            MLP("layers.*.mlp", columns={"fc1": even}, row={"fc2": even}, inputs=("hidden_states",)),
        ),
        Vocabulary(),
        ("layers.*.input_layernorm", "final_layernorm", "score"),
        parallel_residual="layers.*",
    ),
    Policy(
        ("phi3",),
        (
            Attention(
                "layers.*.self_attn",
                columns={"qkv_proj": Blocks(("q", "k", "v"))},
                # its forward cuts q, k and v out of the fused output by the counts in the config
                local_sizes={**GROUPS, "num_key_value_heads": "kv_heads", "config.num_attention_heads": "q_heads"},
            ),
            FUSED_MLP,
        ),
        Vocabulary(),
        (*NORMS, "score"),
    ),
)
