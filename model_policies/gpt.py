"""GPT-Neo, GPT-J, GPT-NeoX, Persimmon, CodeGen and GPT-BigCode (StarCoder)."""

from tp_plugin.errors import PolicyError
from tp_plugin.policy import MLP, Attention, PerGroup, PerHead, Policy, Vocabulary, even, q
from tp_plugin.policy.layout import Parts
from tp_plugin.policy.split import HeadSplit

QKV = {"q_proj": q, "k_proj": q, "v_proj": q}
FUSED_4H = {"columns": {"dense_h_to_4h": even}, "row": {"dense_4h_to_h": even}, "inputs": ("hidden_states",)}
FC_IN_OUT = MLP("h.*.mlp", columns={"fc_in": even}, row={"fc_out": even}, inputs=("hidden_states",))
C_FC = MLP("h.*.mlp", columns={"c_fc": even}, row={"c_proj": even}, inputs=("hidden_states",))
TASK_HEADS = ("score", "qa_outputs", "classifier")


def _in_quarters(size: int, tp: int, heads: HeadSplit, kinds: int) -> Parts:
    """CodeGen's order, from training on 4 TPU cores: four blocks, each with ``kinds`` × its quarter of the heads."""
    if heads.q_heads % (4 * tp):
        raise PolicyError(
            f"CodeGen keeps its heads in 4 blocks; tp_size={tp} needs a multiple of {4 * tp} attention heads, "
            f"found {heads.q_heads}"
        )
    width = size // (4 * kinds)  # of one kind in one block
    mine = width // tp
    starts = [[at * width + rank * mine for at in range(4 * kinds)] for rank in range(tp)]
    return tuple(tuple((start, start + mine) for start in ranks) for ranks in starts)


def quarters_of_qvk(size: int, tp: int, heads: HeadSplit) -> Parts:
    """``[q|v|k]`` four times."""
    return _in_quarters(size, tp, heads, 3)


def quarters(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Heads four times."""
    return _in_quarters(size, tp, heads, 1)


POLICIES = (
    Policy(
        ("gpt_neo",),
        (
            Attention(
                "h.*.attn.attention",
                columns=QKV,
                row={"out_proj": q},
                heads="num_heads",
                kv_heads="num_heads",
                local_sizes={"num_heads": "q_heads"},
            ),
            C_FC,
        ),
        Vocabulary("wte"),
        ("wpe", "h.*.ln_1", "h.*.ln_2", "ln_f", *TASK_HEADS),
    ),
    Policy(
        ("gptj",),
        (
            Attention(
                "h.*.attn",
                columns=QKV,
                row={"out_proj": q},
                kv_heads="num_attention_heads",
                local_sizes={"num_attention_heads": "q_heads"},
            ),
            FC_IN_OUT,
        ),
        Vocabulary("wte"),
        ("h.*.ln_1", "ln_f", "score", "qa_outputs"),
        parallel_residual="h.*",
    ),
    Policy(
        ("codegen",),
        (
            Attention(
                "h.*.attn",
                columns={"qkv_proj": quarters_of_qvk},
                row={"out_proj": quarters},
                kv_heads="num_attention_heads",
                local_sizes={"num_attention_heads": "q_heads"},
            ),
            FC_IN_OUT,
        ),
        Vocabulary("wte"),
        ("h.*.ln_1", "ln_f"),
        parallel_residual="h.*",
    ),
    Policy(
        ("gpt_neox",),
        (
            Attention(
                "layers.*.attention",
                columns={"query_key_value": PerHead()},
                row={"dense": q},
                kv_heads="num_attention_heads",
            ),
            MLP("layers.*.mlp", **FUSED_4H),
        ),
        Vocabulary("embed_in"),
        (
            *("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "final_layer_norm"),
            *TASK_HEADS,
        ),
        parallel_residual="layers.*",
        parallel_residual_if=lambda config: config.use_parallel_residual,
    ),
    Policy(
        ("persimmon",),
        (
            Attention(
                "layers.*.self_attn",
                columns={"query_key_value": PerHead()},
                row={"dense": q},
                kv_heads="num_attention_heads",
                partial=("q_layernorm?", "k_layernorm?"),
                local_sizes={"num_heads": "q_heads"},
            ),
            MLP("layers.*.mlp", **FUSED_4H),
        ),
        Vocabulary(),
        ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "final_layernorm", "score"),
    ),
    Policy(
        ("gpt_bigcode",),
        (
            Attention(
                "h.*.attn",
                columns={"c_attn": PerGroup()},  # [q…q|k|v] with one key and value, else [q k v] per head
                row={"c_proj": q},
                kv_heads=lambda config: 1 if config.multi_query else config.num_attention_heads,
                local_sizes={
                    "num_heads": "q_heads",
                    "kv_heads": "kv_heads",
                    "num_key_value_groups": "groups",
                    "embed_dim": "q_width",
                    "kv_dim": "kv_width",
                },
            ),
            C_FC,
        ),
        Vocabulary("wte"),
        ("wpe", "h.*.ln_1", "h.*.ln_2", "ln_f", "score", "classifier"),
    ),
)
