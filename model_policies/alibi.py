"""BLOOM, Falcon and MPT: fused q, k and v, and position biases (ALiBi) that come with a dimension of heads."""

from tp_plugin.policy import MLP, Attention, Blocks, PerGroup, PerHead, Policy, Vocabulary, even, q

FOUR_H = MLP("h.*.mlp", columns={"dense_h_to_4h": even}, row={"dense_4h_to_h": even}, inputs=("hidden_states",))
FALCON_MLP = MLP("h.*.mlp", columns={"dense_h_to_4h": even}, row={"dense_4h_to_h": even})
NORMS = ("h.*.input_layernorm", "h.*.post_attention_layernorm", "ln_f")
TASK_HEADS = ("score", "qa_outputs", "classifier")


def falcon_kv_heads(config: object) -> int:
    """Falcon-7B has one key and value, Falcon-40B has groups, Falcon-RW one per head."""
    if config.new_decoder_architecture:  # type: ignore[attr-defined]
        return config.num_kv_heads  # type: ignore[attr-defined, no-any-return]
    return 1 if config.multi_query else config.num_attention_heads  # type: ignore[attr-defined, no-any-return]


POLICIES = (
    Policy(
        ("bloom",),
        (
            Attention(
                "h.*.self_attention",
                columns={"query_key_value": PerHead()},
                row={"dense": q},
                heads="n_head",
                kv_heads="n_head",
                head_inputs={"alibi": -3},  # (batch · heads, 1, keys)
                local_sizes={"num_heads": "q_heads"},
            ),
            FOUR_H,
        ),
        Vocabulary("word_embeddings"),
        ("word_embeddings_layernorm", *NORMS, *TASK_HEADS),
    ),
    Policy(
        ("falcon",),
        (
            Attention(
                "h.*.self_attention",
                columns={"query_key_value": PerGroup()},
                row={"dense": q},
                kv_heads=falcon_kv_heads,
                head_inputs={"alibi": -3, "attention_mask": -3},  # ALiBi is added to the mask, too
                local_sizes={"num_heads": "q_heads", "num_kv_heads": "kv_heads"},
            ),
            FALCON_MLP,
        ),
        Vocabulary("word_embeddings"),
        (*NORMS, "h.*.ln_attn", "h.*.ln_mlp", *TASK_HEADS),
        linears=("FalconLinear",),
        parallel_residual="h.*",
        parallel_residual_if=lambda config: config.parallel_attn or config.new_decoder_architecture,
    ),
    Policy(
        ("mpt",),
        (
            Attention(
                "blocks.*.attn",
                columns={"Wqkv": Blocks(("q", "k", "v"))},
                row={"out_proj": q},
                heads="n_heads",
                kv_heads="n_heads",
                head_inputs={"position_bias": -3},  # (heads, 1, keys)
                local_sizes={"n_heads": "q_heads"},
            ),
            MLP("blocks.*.ffn", columns={"up_proj": even}, row={"down_proj": even}, inputs=("hidden_states",)),
        ),
        Vocabulary("wte"),
        ("blocks.*.norm_1", "blocks.*.norm_2", "norm_f", *TASK_HEADS),
    ),
)
