"""CLIP and SigLIP: two towers, each with head counts of its own, and projections that every rank holds whole."""

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even, q

BLOCKS = (
    Attention(
        "layers.*.self_attn",
        columns={"q_proj": q, "k_proj": q, "v_proj": q},
        row={"out_proj": q},
        kv_heads="num_attention_heads",
        local_sizes={"num_heads": "q_heads", "embed_dim": "q_width"},
    ),
    MLP("mlp", columns={"fc1": even}, row={"fc2": even}, inputs=("hidden_states",)),
)
WORDS = Vocabulary("token_embedding", None)
NORMS = ("layers.*.layer_norm1", "layers.*.layer_norm2")
IMAGE = ("embeddings.patch_embedding", "embeddings.position_embedding")
TEXT = ("embeddings.position_embedding", "final_layer_norm")
TOWERS = {"text_model": "text_config", "vision_model": "vision_config"}

POLICIES = (
    Policy(("clip",), towers=TOWERS, replicated=("text_projection", "visual_projection", "logit_scale", "classifier")),
    Policy(("clip_text_model",), BLOCKS, WORDS, (*NORMS, *TEXT, "text_projection")),
    Policy(
        ("clip_vision_model",),
        BLOCKS,
        replicated=(
            *(*NORMS, *IMAGE, "embeddings.class_embedding", "pre_layrnorm", "post_layernorm", "visual_projection"),
        ),
    ),
    Policy(("siglip",), towers=TOWERS, replicated=("logit_scale", "logit_bias", "classifier")),
    Policy(("siglip_text_model",), BLOCKS, WORDS, (*NORMS, *TEXT, "head")),
    Policy(
        ("siglip_vision_model",),
        BLOCKS,
        # the pooling head's attention is torch's nn.MultiheadAttention, whose fused forward cannot run on some heads
        replicated=(*NORMS, *IMAGE, "post_layernorm", "head.probe", "head.attention", "head.layernorm"),
    ),
)
