"""GPT-Neo, GPT-J, GPT-NeoX, Persimmon, CodeGen and GPT-BigCode (StarCoder)."""

from collections.abc import Iterator

import torch

from tp_plugin.errors import PolicyError
from tp_plugin.policy import MLP, Attention, PerGroup, PerHead, Policy, Vocabulary, even, q
from tp_plugin.policy.layout import Parts, Range
from tp_plugin.policy.split import HeadSplit

QKV = {"q_proj": q, "k_proj": q, "v_proj": q}
FUSED_4H = {"columns": {"dense_h_to_4h": even}, "row": {"dense_4h_to_h": even}, "inputs": ("hidden_states",)}
FC_IN_OUT = MLP("h.*.mlp", columns={"fc_in": even}, row={"fc_out": even}, inputs=("hidden_states",))
C_FC = MLP("h.*.mlp", columns={"c_fc": even}, row={"c_proj": even}, inputs=("hidden_states",))
TASK_HEADS = ("score", "qa_outputs", "classifier")


def quarters_of_qvk(size: int, tp: int, heads: HeadSplit) -> Parts:
    """CodeGen's order, from training on 4 TPU cores: four blocks ``[q|v|k]``, each with a quarter of the heads.

    A rank takes heads in order, and lays them out in four such blocks again, which may cut a head in two: the forward
    joins the blocks before it counts heads.
    """
    width = size // 12  # of one kind in one block of the whole model
    head = 4 * width // heads.q_heads
    parts = []
    for first, last in heads.q:
        step, rest = divmod((last - first) * head, 4)  # of one kind in one block of this rank
        if rest:
            raise PolicyError(
                f"CodeGen lays its heads out in 4 blocks; with tp_size={tp} a rank has {last - first} heads of "
                f"{head} numbers, which do not divide by 4"
            )
        starts = [first * head + block * step for block in range(4)]
        parts.append(
            tuple(piece for start in starts for kind in range(3) for piece in _pieces(start, start + step, kind, width))
        )
    return tuple(parts)


def _pieces(start: int, stop: int, kind: int, width: int) -> Iterator[Range]:
    """The numbers ``start`` to ``stop`` of all queries (or values, or keys), as ranges of the whole order."""
    while start < stop:
        block, inside = divmod(start, width)
        end = min(stop, (block + 1) * width)
        place = (3 * block + kind) * width + inside
        yield place, place + end - start
        start = end


def join_blocks(x: torch.Tensor, n_head: int, dim_head: int, mp_num: int) -> torch.Tensor:
    """CodeGen's ``_split_heads`` (batch, tokens, 4, width) → (batch, tokens, heads, dim_head), for any ``n_head``."""
    return x.reshape(*x.shape[:2], n_head, dim_head)


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
                row={"out_proj": q},
                kv_heads="num_attention_heads",
                local_sizes={"num_attention_heads": "q_heads"},
                methods={"_split_heads": join_blocks},
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
