"""T5 and BART kin: encoder and decoder of one kind of layer, cross-attention, relative-position biases by head."""

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even, q

T5_ATTENTION = {
    "columns": {"q": q, "k": q, "v": q},
    "row": {"o": q},
    "kv_heads": "num_attention_heads",
    "inputs": ("hidden_states", "key_value_states"),
    "per_head": {"relative_attention_bias?": (q, 1)},
    "local": {"n_heads": "q_heads", "inner_dim": "q_width"},
}
BART_ATTENTION = {
    "columns": {"q_proj": q, "k_proj": q, "v_proj": q},
    "row": {"out_proj": q},
    "kv_heads": "num_attention_heads",
    "inputs": ("hidden_states", "key_value_states"),
    "local": {"num_heads": "q_heads", "embed_dim": "q_width"},
}

POLICIES = (
    Policy(
        ("t5", "mt5"),
        (
            Attention("layer.*.SelfAttention", **T5_ATTENTION),
            Attention("layer.*.EncDecAttention", **T5_ATTENTION, optional=True),
            MLP(
                "layer.*.DenseReluDense",
                columns={"wi?": even, "wi_0?": even, "wi_1?": even},
                row={"wo": even},
                inputs=("hidden_states",),
            ),
        ),
        Vocabulary(("shared", "embed_tokens")),
        ("layer.*.layer_norm", "final_layer_norm", "classification_head", "qa_outputs"),
    ),
    Policy(
        ("bart", "mbart"),
        (
            Attention("layers.*.self_attn", **BART_ATTENTION),
            Attention("layers.*.encoder_attn", **BART_ATTENTION, optional=True),
            MLP("layers.*", columns={"fc1": even}, row={"fc2": even}, inputs=()),
        ),
        Vocabulary(("shared", "embed_tokens")),
        (
            *("embed_positions", "layernorm_embedding", "layers.*.self_attn_layer_norm"),
            *("layers.*.encoder_attn_layer_norm", "layers.*.final_layer_norm", "layer_norm"),
            *("classification_head", "qa_outputs"),
        ),
    ),
)
