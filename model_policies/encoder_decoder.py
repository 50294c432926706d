"""T5, and BART and its kin: encoder and decoder, cross-attention, relative-position biases by head (T5)."""

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even, q

CROSS = ("hidden_states", "key_value_states")
T5_ATTENTION = {
    "columns": {"q": q, "k": q, "v": q},
    "row": {"o": q},
    "kv_heads": "num_attention_heads",
    "local_sizes": {"n_heads": "q_heads", "inner_dim": "q_width"},
}


def bart_attention(path: str, heads: str, inputs: tuple[str, ...] = ("hidden_states",)) -> Attention:
    """BART's attention; encoder and decoder have head counts of their own."""
    return Attention(
        path,
        columns={"q_proj": q, "k_proj": q, "v_proj": q},
        row={"out_proj": q},
        heads=heads,
        kv_heads=heads,
        inputs=inputs,
        local_sizes={"num_heads": "q_heads", "embed_dim": "q_width"},
        optional=True,  # a model may be the encoder or the decoder alone
    )


BART_BLOCKS = (
    bart_attention("encoder.layers.*.self_attn", "encoder_attention_heads"),
    bart_attention("decoder.layers.*.self_attn", "decoder_attention_heads"),
    bart_attention("decoder.layers.*.encoder_attn", "decoder_attention_heads", CROSS),
    MLP("layers.*", columns={"fc1": even}, row={"fc2": even}, inputs=()),
)
BART_REPLICATED = (
    *("embed_positions", "layers.*.self_attn_layer_norm", "layers.*.encoder_attn_layer_norm"),
    *("layers.*.final_layer_norm", "layer_norm"),
)

POLICIES = (
    Policy(
        ("t5", "mt5"),
        (
            Attention("layer.*.SelfAttention", **T5_ATTENTION, tensors={"relative_attention_bias?": (q, 1)}),
            Attention("layer.*.EncDecAttention", **T5_ATTENTION, inputs=CROSS, optional=True),
            MLP(
                "layer.*.DenseReluDense",
                columns={"wi?": even, "wi_0?": even, "wi_1?": even},
                row={"wo": even},
                inputs=("hidden_states",),
            ),
        ),
        Vocabulary(("shared", "embed_tokens")),
        ("layer.*.layer_norm", "final_layer_norm", "classification_head", "classifier", "qa_outputs"),
    ),
    Policy(
        ("bart", "mbart", "plbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "m2m_100"),
        BART_BLOCKS,
        Vocabulary(("shared", "embed_tokens")),
        (*BART_REPLICATED, "layernorm_embedding", "classification_head", "qa_outputs"),
    ),
)
