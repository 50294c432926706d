"""Vision transformers: attention and MLP are sharded; patches, positions, class and register tokens stay whole."""

from tp_plugin.policy import MLP, Attention, Blocks, Policy, Vocabulary, even, q

QKV = {"q_proj": q, "k_proj": q, "v_proj": q}
EMBEDDINGS = ("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings", "patch_embeddings")
VIT_ATTENTION = Attention("layers.*.attention", columns=QKV, kv_heads="num_attention_heads")
VIT_MLP = MLP("layers.*.mlp", columns={"fc1": even}, row={"fc2": even}, inputs=("hidden_states",))
# relative positions come as a mask of all heads, of this layer or shared by all
BEIT_ATTENTION = Attention(
    "layers.*.attention", columns=QKV, kv_heads="num_attention_heads", head_inputs={"attention_mask": -3}
)
VIT_NORMS = ("layers.*.layernorm_before", "layers.*.layernorm_after", "layernorm")

DINOV2 = {"kv_heads": "num_attention_heads", "optional": True}
DINOV2_BLOCKS = (
    Attention("layer.*.attention", columns=QKV, requires="o_proj", **DINOV2),
    MLP("layer.*.mlp", columns={"fc1": even}, row={"fc2": even}, inputs=("*",), requires="fc1", optional=True),
    MLP("layer.*.mlp", requires="down_proj", optional=True),  # use_swiglu_ffn
    # the older names (transformers 5.17)
    Attention(
        "layer.*.attention",
        columns={"attention.query": q, "attention.key": q, "attention.value": q},
        row={"output.dense": q},
        local_sizes={"attention.num_attention_heads": "q_heads", "attention.all_head_size": "q_width"},
        requires="output.dense",
        **DINOV2,
    ),
    MLP(
        "layer.*.mlp",
        columns={"weights_in": Blocks(("even", "even"))},
        row={"weights_out": even},
        inputs=("*",),
        requires="weights_in",
        optional=True,
    ),
)

POLICIES = (
    Policy(
        ("vit", "deit"),
        (VIT_ATTENTION, VIT_MLP),
        replicated=(
            *(*EMBEDDINGS, "embeddings.distillation_token", *VIT_NORMS),
            *("pooler", "classifier", "cls_classifier", "distillation_classifier"),
            "decoder",  # of masked image modelling: a convolution
        ),
    ),
    Policy(
        ("beit",),
        (BEIT_ATTENTION, VIT_MLP),
        Vocabulary((), "lm_head"),  # of masked image modelling: visual tokens
        (
            *(*EMBEDDINGS, *VIT_NORMS, "layers.*.lambda_1", "layers.*.lambda_2", "pooler", "classifier"),
            *("layers.*.relative_position_bias", "shared_position_bias"),
            *("fpn", "decode_head", "auxiliary_head"),  # of segmentation
        ),
    ),
    Policy(
        ("dinov2", "dinov2_with_registers"),
        DINOV2_BLOCKS,
        replicated=(
            *(*EMBEDDINGS, "embeddings.register_tokens", "layer.*.norm1", "layer.*.norm2", "layernorm", "classifier"),
            *("layer.*.layer_scale1", "layer.*.layer_scale2"),
        ),
    ),
)
