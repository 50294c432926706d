"""OPT and its kin: ``fc1`` and ``fc2`` stand in the layer itself."""

import dataclasses

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even, q

ATTENTION = Attention(
    "layers.*.self_attn",
    columns={"q_proj": q, "k_proj": q, "v_proj": q},
    row={"out_proj": q},
    kv_heads="num_attention_heads",
    local_sizes={"num_heads": "q_heads", "embed_dim": "q_width"},
)
MLP_IN_LAYER = MLP("layers.*", columns={"fc1": even}, row={"fc2": even}, inputs=())
NORMS = ("layers.*.self_attn_layer_norm", "layers.*.final_layer_norm")

POLICIES = (
    Policy(
        ("opt",),
        (ATTENTION, MLP_IN_LAYER),
        Vocabulary(),
        ("embed_positions", "project_in", "project_out", *NORMS, "final_layer_norm", "score", "qa_outputs"),
    ),
    Policy(
        ("xglm",),
        (dataclasses.replace(ATTENTION, folded_heads=True), MLP_IN_LAYER),
        Vocabulary(),
        (*NORMS, "layer_norm"),
    ),
    Policy(
        ("biogpt",),
        (ATTENTION, MLP_IN_LAYER),
        Vocabulary(head="output_projection"),
        ("embed_positions", *NORMS, "layer_norm", "score", "classifier"),
    ),
)
