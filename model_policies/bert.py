"""BERT and its kin: the residual is added inside the attention block, behind its row-parallel ``output.dense``."""

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even, q

SELF_ATTENTION = {
    "columns": {"self.query": q, "self.key": q, "self.value": q},
    "row": {"output.dense": q},
    "kv_heads": "num_attention_heads",
    "entry": "self",
    "local_sizes": {"self.num_attention_heads": "q_heads", "self.all_head_size": "q_width"},
}
BLOCKS = (
    Attention("layer.*.attention", **SELF_ATTENTION),
    MLP("layer.*", columns={"intermediate.dense": even}, row={"output.dense": even}, inputs=()),
)
REPLICATED = (
    "embeddings.position_embeddings", "embeddings.token_type_embeddings", "embeddings.LayerNorm",
    "layer.*.attention.output.LayerNorm", "layer.*.output.LayerNorm",
    "classifier", "qa_outputs",
)  # fmt: skip
WORDS = "embeddings.word_embeddings"

POLICIES = (
    Policy(
        ("bert",),
        BLOCKS,
        Vocabulary(WORDS, "cls.predictions.decoder"),
        (*REPLICATED, "pooler", "cls.predictions.transform", "cls.seq_relationship"),
    ),
    Policy(
        ("roberta", "xlm-roberta", "camembert"),
        BLOCKS,
        Vocabulary(WORDS, "lm_head.decoder"),
        (*REPLICATED, "pooler", "lm_head.dense", "lm_head.layer_norm"),
    ),
    Policy(
        ("electra",),
        BLOCKS,
        Vocabulary(WORDS, "generator_lm_head"),
        (
            *(*REPLICATED, "embeddings_project", "generator_predictions", "discriminator_predictions"),
            "sequence_summary.summary",
        ),
    ),
    Policy(
        ("distilbert",),
        (
            Attention(
                "layer.*.attention",
                columns={"q_lin": q, "k_lin": q, "v_lin": q},
                row={"out_lin": q},
                heads="n_heads",
                kv_heads="n_heads",
                local_sizes={"n_heads": "q_heads", "dim": "q_width"},
            ),
            MLP("layer.*.ffn", columns={"lin1": even}, row={"lin2": even}, inputs=("input",)),
        ),
        Vocabulary(WORDS, "vocab_projector"),
        (
            *("embeddings.position_embeddings", "embeddings.LayerNorm", "layer.*.sa_layer_norm"),
            *("layer.*.output_layer_norm", "vocab_transform", "vocab_layer_norm"),
            *("pre_classifier", "classifier", "qa_outputs"),
        ),
    ),
)
