"""What can be seen, before it trains, of a derived policy that is wrong: widths that do not meet, heads nobody adjusts.

``base_model_tp_plan`` names one style per linear; it does not say that a linear is several fused ones, or what a module
counts its heads by. Either mistake gives a model that runs, with wrong numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.plan import BlockPlan, Plan
from tp_plugin.policy.scope import Scope

WRITE = "write a policy for this architecture (docs, 'Add an architecture')"
HEAD_COUNT = re.compile(r"heads?(?!_?(dim|size|width))")
"""Names of attributes that count heads, other than the width of one."""


def check_derived(scope: Scope) -> None:
    """Refuse a derived plan whose blocks cannot be right.

    Raises:
        PolicyError: naming the module, its style in the plan, and what to do.
    """
    for path, block in scope.plan.blocks.items():
        if not scope.covers(path):
            continue
        _check_head_counts(scope, path, block)
        if block.heads is None and block.rows:
            _check_mlp(scope, block)
        # a proven attention may have a fused projection of its own, in the order that the split expects
        elif block.rows and not (scope.policy.proven or block.input_of):
            _check_attention(scope, block)


def unproven_warning(plans: Collection[Plan]) -> str | None:
    """What to say before training of architectures whose policy was derived and is proven by no test; None if none."""
    names = sorted({name for plan in plans for name in plan.unproven})
    if not names:
        return None
    return (
        f"the tensor-parallel policy for {' and '.join(map(repr, names))} was derived from transformers' "
        "base_model_tp_plan, and no test of tp_plugin proves it. Prove it before you train: "
        + " and ".join(f"`tp-plugin verify {name}`" for name in names)
    )


def _check_head_counts(scope: Scope, path: str, block: BlockPlan) -> None:
    for name, value in vars(scope.modules[path]).items():
        if type(value) is not int or not HEAD_COUNT.search(name) or (path, name) in scope.plan.attributes:
            continue
        if block.heads is None or value in (block.heads.q_heads, block.heads.kv_heads):
            columns = ", ".join(column.removeprefix(f"{path}.") for column in block.columns)
            scope.fail(
                f"{path}.{name} = {value} seems to count heads, of which each rank computes some once {columns} "
                f"(colwise) are split, but the plan does not say how it changes; {WRITE}"
            )


def _check_mlp(scope: Scope, block: BlockPlan) -> None:
    """Each column-parallel output must have the width of the row-parallel input, which is a product of them."""
    row = _layout(scope.plan, block.rows[0])
    for column in block.columns:
        layout = _layout(scope.plan, column)
        if _width(layout) != _width(row):
            scope.fail(
                f"{column} (colwise) gives {_width(layout)} features, but {block.rows[0]} (rowwise) takes "
                f"{_width(row)}; if it is several linears fused, or an attention's, the plan does not say how to split "
                f"it; {WRITE}"
            )


def _check_attention(scope: Scope, block: BlockPlan) -> None:
    """Queries and keys must have one width per head, values and outputs another; a further output is one per head."""
    assert block.heads is not None
    q_heads, kv_heads = block.heads.q_heads, block.heads.kv_heads
    row = _width(_layout(scope.plan, block.rows[0])) / q_heads
    columns = {column.removesuffix(".base_layer").rpartition(".")[2]: column for column in block.columns}
    widths = {name: _width(_layout(scope.plan, column)) for name, column in columns.items()}
    key = widths["k_proj"] / kv_heads if "k_proj" in widths else row
    for name, width in widths.items():
        heads = kv_heads if name in ("k_proj", "v_proj") else q_heads
        expected = {"q_proj": (key,), "k_proj": (key,), "v_proj": (row,)}.get(name, (row, 1))
        if width / heads not in expected:
            scope.fail(
                f"{columns[name]} (colwise) gives {width} features, {width / heads:g} for each of {heads} heads, where "
                f"{' or '.join(f'{one:g}' for one in expected)} would match k_proj and {block.rows[0]} (rowwise); if "
                f"it is several linears fused, the plan does not say how to split it; {WRITE}"
            )


def _layout(plan: Plan, linear: str) -> ParamLayout:
    return plan.layouts[f"{linear}.weight"].features


def _width(layout: ParamLayout) -> int:
    assert layout.dim is not None
    return layout.shape[layout.dim]
