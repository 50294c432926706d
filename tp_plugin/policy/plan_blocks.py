"""The blocks of a policy in one model: their linears, where they begin, and what their modules must count."""

from __future__ import annotations

import inspect
import operator

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Attention, Block, Experts
from tp_plugin.policy.config_check import head_split
from tp_plugin.policy.lora import is_adapted
from tp_plugin.policy.plan import BlockPlan
from tp_plugin.policy.plan_experts import is_expert_parallel, plan_experts
from tp_plugin.policy.plan_weights import plan_linear, plan_tensor
from tp_plugin.policy.scope import Scope
from tp_plugin.policy.split import NO_HEADS, HeadSplit


def plan_block(scope: Scope, block: Block) -> None:
    """Plan every module that matches ``block``.

    Raises:
        PolicyError: no module matches, or one that does is not such a block.
    """
    paths = [path for path in scope.matching(block.path) if scope.has(path, block.requires)]
    if not paths and not block.optional:
        scope.fail(f"no module matches {block.path!r}" + (f" and has {block.requires!r}" if block.requires else ""))
    for path in paths:
        if path in scope.plan.blocks:
            scope.fail(f"{path} is two blocks")
        _plan_one(scope, path, block)


def _plan_one(scope: Scope, path: str, block: Block) -> None:
    heads = _heads(scope, path, block) if isinstance(block, Attention) else NO_HEADS
    entry = scope.module(f"{path}.{block.entry}") if block.entry else path
    planned = BlockPlan(block.inputs, entry)
    if isinstance(block, Attention):
        planned.heads, planned.folded_heads = heads, block.folded_heads
    scope.plan.blocks[path] = planned
    index = (block.index,) if isinstance(block, Experts) and is_expert_parallel(scope, block) else ()
    _check_arguments(scope, entry, (*block.inputs, *block.head_inputs, *index))
    _linears(scope, path, block, planned, heads)
    for partial in scope.paths(path, block.partial):
        scope.plan.partial |= set(scope.claim_replicated(partial))
    for replicated in scope.paths(path, block.replicated):
        scope.claim_replicated(replicated)
    if isinstance(block, Experts):
        plan_experts(scope, path, block, planned)
    else:
        for name, (split, dim) in scope.present(path, block.tensors).items():
            plan_tensor(scope, f"{path}.{name}", split, dim, heads)
    for name, split in scope.present(path, block.sharded_norms).items():
        plan_tensor(scope, f"{path}.{name}.weight", split, 0, heads)
        scope.plan.sharded_norms[f"{path}.{name}"] = scope.parameters[f"{path}.{name}.weight"].shape[0]
    planned.head_inputs = {name: (dim, heads.q_heads, heads.q) for name, dim in block.head_inputs.items()}
    for dropout in scope.paths(path, block.shared_dropouts):
        scope.plan.dropouts[scope.module(dropout)] = "replicated"
    _local_sizes(scope, path, block, heads)
    for name, function in block.methods.items():
        if not callable(getattr(scope.modules[path], name, None)):
            scope.fail(f"{path} has no method {name!r}, which the policy wants to replace")
        scope.plan.methods[path, name] = function


def _linears(scope: Scope, path: str, block: Block, planned: BlockPlan, heads: HeadSplit) -> None:
    """Claim the linears, and find out where the block begins if that is not at arguments of its forward."""
    plan = scope.plan
    columns_before, rows_before = len(plan.columns), len(plan.rows)
    for name, split in scope.present(path, block.columns).items():
        plan_linear(scope, f"{path}.{name}", split, heads, column=True)
    for name, split in scope.present(path, block.row).items():
        plan_linear(scope, f"{path}.{name}", split, heads, column=False)
    columns, planned.rows = plan.columns[columns_before:], plan.rows[rows_before:]
    named = scope.paths(path, block.columns)
    planned.columns = [column for column in columns if column.removesuffix(".base_layer") in named]
    planned.input_of = tuple(scope.paths(path, block.input_of))
    planned.output_of = tuple(scope.paths(path, block.output_of))
    if not (block.inputs or planned.input_of or planned.output_of):
        if len(columns) != 1:
            scope.fail(f"block {block.path!r} has no inputs, but {len(columns)} column-parallel modules")
        planned.input_of = (columns[0],)


def _check_arguments(scope: Scope, path: str, names: tuple[str, ...]) -> None:
    taken = inspect.signature(scope.modules[path].forward).parameters
    for name in names:
        if name not in taken and name != "*":
            scope.fail(f"the forward of {path} takes no argument {name!r}, only {', '.join(taken) or 'none'}")


def _heads(scope: Scope, path: str, block: Attention) -> HeadSplit:
    try:
        return head_split(scope.config, block, scope.plan.tp)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


MEANINGS = ("q_heads", "kv_heads", "groups", "q_width", "kv_width", "width")
"""What an attribute in ``local_sizes`` may count."""


def _local_sizes(scope: Scope, path: str, block: Block, heads: HeadSplit) -> None:
    """Record what each rank writes into the attributes by which the block's module counts."""
    for name, meaning in block.local_sizes.items():
        attribute = name.removesuffix("?")
        try:
            whole = operator.attrgetter(attribute)(scope.modules[path])
        except AttributeError:
            if name.endswith("?"):
                continue
            scope.fail(f"{path} has no attribute {attribute!r}, which the policy wants to set")
        if meaning not in MEANINGS:
            scope.fail(f"local_sizes[{attribute!r}] = {meaning!r}; write one of {', '.join(MEANINGS)}")
        expected, sizes = _size_by_rank(scope, path, block, heads, meaning, whole)
        if whole != expected:
            scope.fail(f"{path}.{attribute} is {whole}, but by the config's head counts {meaning} is {expected}")
        scope.plan.attributes[path, attribute] = tuple(sizes)


def _size_by_rank(
    scope: Scope, path: str, block: Block, heads: HeadSplit, meaning: str, whole: int
) -> tuple[int, list[int]]:
    """What an attribute of this meaning is in the whole model, and on each rank."""
    q, kv = ([stop - start for start, stop in ranges] for ranges in (heads.q, heads.kv))
    counts = {
        "q_heads": (heads.q_heads, q),
        "kv_heads": (heads.kv_heads, kv),
        "groups": (heads.q_heads // heads.kv_heads, [a // b for a, b in zip(q, kv, strict=True)]),
    }
    if meaning in counts:
        return counts[meaning]
    if meaning == "width":
        row = f"{path}.{next(iter(block.row))}"
        base = f"{row}.base_layer" if is_adapted(scope.modules[row]) else row
        layout = scope.plan.layouts[f"{base}.weight"].features
        assert layout.dim is not None
        return whole, [layout.local_shape(rank)[layout.dim] for rank in range(scope.plan.tp)]
    total, held = counts["q_heads" if meaning == "q_width" else "kv_heads"]
    return whole, [count * (whole // total) for count in held]
