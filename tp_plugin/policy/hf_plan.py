"""A policy from the ``base_model_tp_plan`` that a transformers config carries, with its blocks recovered.

The plan names a style for each linear layer (transformers, ``integrations/tensor_parallel.py``). Linears of one parent
make a block here, so that its backward has one reduction where the plan's own styles have one for each linear. Whatever
lies outside the blocks is replicated; a parameter inside a block that the plan does not name is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import MLP, Attention, Block, Experts, Policy, Vocabulary
from tp_plugin.policy.split import Blocks, Split, aligned, even, kv, q

WHOLE = {"colwise_gather_output", "rowwise_split_input", "replicate"}
"""Styles of modules whose inputs and outputs are whole on every rank: they are computed whole here."""

HEAD_COUNTS = {
    "num_heads?": "q_heads",
    "num_attention_heads?": "q_heads",
    "num_key_value_heads?": "kv_heads",
    "num_kv_heads?": "kv_heads",
    "num_key_value_groups?": "groups",
}
"""Attributes by which attention modules count their heads."""

# fmt: off
PROVEN = frozenset((
    "afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "cwm", "deepseek_v4", "ernie4_5_moe", "eurobert",
    "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm4v_text",
    "glm_image_text", "glm_ocr_text", "granite_docling_text", "granite_swa", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "higgs_audio_v2", "hrm_text", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "jamba", "kolibri1", "laguna", "mellum", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral3", "mistral_large4_text", "muse_glimmer_text", "nanochat", "olmo_hybrid",
    "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "solar_open", "ultrabert",
    "vaultgemma", "youtu",
))
# fmt: on
"""Architectures whose derived policy tests/test_hf_plan.py proves; of others a warning says so before they train."""

LATENT = ("q_a_proj?", "q_a_layernorm?", "kv_a_proj_with_mqa")


def policy_from_plan(config: Any) -> Policy | None:
    """The policy that ``config.base_model_tp_plan`` amounts to; None if there is no such plan.

    Raises:
        PolicyError: a style or a combination of styles that is not understood, named with its module.
    """
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    parents: dict[str, dict[str, str]] = {}
    for pattern, style in plan.items():
        if style not in WHOLE:
            parent, _, name = pattern.rpartition(".")
            parents.setdefault(parent, {})[name] = style
    blocks: list[Block] = []
    for parent, styles in parents.items():
        experts = styles.pop("experts", None) or styles.pop("shared_experts", None)
        if experts not in (None, "moe_tp_experts"):
            _refuse(config, f"{parent}.experts", experts)
        styles = {name: style for name, style in styles.items() if style != "local_params"}
        if plan.get(parent) == "moe_tp_experts":
            blocks.append(_experts(config, parent, styles))
        elif styles:
            blocks.append(_block(config, parent, styles))
    if not blocks:
        return None
    return Policy(
        (config.model_type,),
        tuple(blocks),
        Vocabulary(),
        rest_replicated=True,
        origin="derived",
        proven=config.model_type in PROVEN,
    )


def _block(config: Any, path: str, styles: Mapping[str, str]) -> Block:
    columns = [name for name, style in styles.items() if style == "colwise"]
    rows = [name for name, style in styles.items() if style == "rowwise"]
    partial = tuple(f"{name}?" for name, style in styles.items() if style == "replicated_with_grad_allreduce")
    latent = styles.get("kv_a_proj_with_mqa") == "mla_kv_a_proj"
    known = {
        *columns,
        *rows,
        *(name.removesuffix("?") for name in partial),
        *(["kv_a_proj_with_mqa"] if latent else []),
    }
    for name, style in styles.items():
        if name not in known:
            _refuse(config, f"{path}.{name}".lstrip("."), style)
    if len(rows) != 1 or not columns:
        raise PolicyError(
            f"base_model_tp_plan of {config.model_type!r}: {path} has {len(columns)} colwise and {len(rows)} rowwise "
            "modules; a block is some colwise modules and the one rowwise module that takes what they give. Write a "
            "policy (docs, 'Add an architecture')"
        )
    row = rows[0]
    if latent:
        return Attention(
            path,
            columns={f"{name}?" if name != "kv_b_proj" else name: q for name in columns},
            row={row: q},
            kv_heads="num_attention_heads",
            inputs=(),
            input_of=("q_proj?", "q_b_proj?"),
            output_of=("kv_a_proj_with_mqa",),
            partial=("kv_a_layernorm", *partial),
            replicated=LATENT,
            local_sizes={"num_heads?": "q_heads"},
            requires=row,
            optional=True,
        )
    projections = {"q_proj", "k_proj", "v_proj"}
    if projections & set(columns):
        if projections - set(columns):
            raise PolicyError(
                f"base_model_tp_plan of {config.model_type!r}: {path} has {', '.join(columns)} (colwise) but no "
                f"{', '.join(sorted(projections - set(columns)))}, so the order of its heads is unknown. Write a "
                "policy (docs, 'Add an architecture')"
            )
        kinds: dict[str, Split] = {"k_proj": kv, "v_proj": kv}
        tensors = [name for name in columns if not name.endswith("proj")]
        return Attention(
            path,
            columns={f"{name}?": kinds.get(name, q) for name in columns if name not in tensors},
            row={row: q},
            inputs=("*",),
            tensors={f"{name}?": (q, 0) for name in tensors},
            partial=partial,
            local_sizes=HEAD_COUNTS,
            requires=row,
            optional=True,
        )
    if partial:
        _refuse(config, f"{path}.{partial[0][:-1]}", "replicated_with_grad_allreduce")
    return MLP(
        path,
        columns={name: even for name in columns},
        row={row: even},
        inputs=("*",),
        requires=row,
        optional=True,
    )


def _experts(config: Any, path: str, styles: Mapping[str, str]) -> Experts:
    gate_up = Blocks(("aligned", "aligned"))
    recipes: dict[tuple[str, str], tuple[Split, int]] = {
        ("gate_up_proj", "packed_colwise"): (gate_up, 1),
        ("up_proj", "colwise"): (aligned, 1),
        ("down_proj", "rowwise"): (aligned, 2),
        ("gate_up_proj", "packed_rowwise"): (gate_up, 2),  # (expert, in, out)
        ("down_proj", "colwise"): (aligned, 1),
    }
    for name, style in styles.items():
        if (name, style) not in recipes:
            _refuse(config, f"{path}.{name}", style)
    return Experts(
        path, inputs=("*",), tensors={name: recipes[name, style] for name, style in styles.items()}, optional=True
    )


def _refuse(config: Any, module: str, style: object) -> None:
    raise PolicyError(
        f"base_model_tp_plan of {config.model_type!r}: the style {style!r} of {module} cannot be imported; "
        "write a policy for this architecture (docs, 'Add an architecture')"
    )
