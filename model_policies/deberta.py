"""DeBERTa, v2 and v3: disentangled attention, whose relative positions go through projections of the block too.

Not claimed, so refused: the masked-LM head of ``legacy=False``, which multiplies by the embedding's weight itself, and
``talking_head``, which mixes the heads.
"""

from model_policies.bert import BLOCKS, WORDS
from tp_plugin.policy import Attention, PerHead, Policy, Vocabulary, q

DISENTANGLED = {
    "row": {"output.dense": q},
    "kv_heads": "num_attention_heads",
    "entry": "self",
    # rel_embeddings: one table for all layers, projected to keys and queries in each
    "inputs": ("hidden_states", "query_states", "rel_embeddings"),
    "shared_dropouts": ("self.pos_dropout?",),
    "local_sizes": {"self.num_attention_heads": "q_heads", "self.all_head_size": "q_width"},
}
REPLICATED = (
    *("embeddings.position_embeddings", "embeddings.token_type_embeddings", "embeddings.embed_proj"),
    *("embeddings.LayerNorm", "encoder.rel_embeddings"),
    *("layer.*.attention.output.LayerNorm", "layer.*.output.LayerNorm"),
    *("cls.predictions.transform", "pooler", "classifier", "qa_outputs"),
)

POLICIES = (
    Policy(
        ("deberta-v2",),
        (
            Attention(
                "layer.*.attention",
                columns={
                    **{"self.query_proj": q, "self.key_proj": q, "self.value_proj": q},
                    **{"self.pos_key_proj?": q, "self.pos_query_proj?": q},  # not with share_att_key
                },
                **DISENTANGLED,
            ),
            BLOCKS[1],
        ),
        Vocabulary(WORDS, "cls.predictions.decoder"),
        (*REPLICATED, "encoder.LayerNorm", "encoder.conv"),
    ),
    Policy(
        ("deberta",),
        (
            Attention(
                "layer.*.attention",
                columns={"self.in_proj": PerHead(), "self.pos_proj?": q, "self.pos_q_proj?": q},
                tensors={"self.q_bias": (q, 0), "self.v_bias": (q, 0)},
                **DISENTANGLED,
            ),
            BLOCKS[1],
        ),
        Vocabulary(WORDS, "cls.predictions.decoder"),
        REPLICATED,
    ),
)
