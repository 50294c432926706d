"""ModernBERT: fused ``[q|k|v]``, fused ``[input|gate]``; its forward counts heads by what arrives."""

from tp_plugin.policy import MLP, Attention, Blocks, Policy, Vocabulary, even, q

POLICIES = (
    Policy(
        ("modernbert",),
        (
            Attention(
                "layers.*.attn",
                columns={"Wqkv": Blocks(("q", "k", "v"))},
                row={"Wo": q},
                kv_heads="num_attention_heads",
            ),
            MLP("layers.*.mlp", columns={"Wi": Blocks(("even", "even"))}, row={"Wo": even}, inputs=("hidden_states",)),
        ),
        Vocabulary("tok_embeddings", "decoder"),
        ("embeddings.norm", "layers.*.attn_norm", "layers.*.mlp_norm", "final_norm", "head", "classifier"),
    ),
)
