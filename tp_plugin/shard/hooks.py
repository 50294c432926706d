"""The life of a forward: every hook that is put on a sharded model, in the order of registration, and why.

    where                        when            what
    blocks, embeddings, heads    before, after   a step around each that the script calls by itself (first, last)
    each block's entry           before          f at its inputs; what it drops is split from here on
    … or modules below it        before, after   the same, where the block begins further inside
    each block                   after           the sum of its partial output; nothing is split from here on, always
    dropouts in or beside blocks before, after   they drop what their input asks for: all of it, or this rank's part
    layers, parallel residual    before, after   two blocks communicate as one
    stacks of layers             before, after   sequence parallelism: tokens split and joined, and what drops them
    models around layers         after           attention weights of all heads, hidden states of all tokens (first)
    output heads                 before, after   f at the hidden states; logits over the full vocabulary (first)
    the model                    before          a deep copy gets its parameters' hooks (first)
    the model, its base model    before, after   the batch guard opens (first of all) and closes, whatever happens
    forwards of the script's own before, after   the script's region around the lines of each (innermost of all)
    what such a one may call     before, after   a step around each, as around blocks

"first" stands before hooks that a script has put on the module; module_hooks.py orders the others. An embedding, a
row-parallel linear, a column-parallel linear that overlaps and a sharded norm have no hooks: their forward is wrapped
(tensor/forward.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tp_plugin.policy import Plan
from tp_plugin.runtime.batch_guard import BatchGuard
from tp_plugin.shard.build import Parts
from tp_plugin.shard.model_state import ModelState
from tp_plugin.shard.own_forwards import called_by_them, own_forwards
from tp_plugin.tensor.global_view.region import DirectCall, OwnForward
from tp_plugin.tensor.graphs import runs_untraced

When = Literal["before", "before, with kwargs", "after", "after, always"]


@dataclass(frozen=True)
class Hook:
    """One row of the table: ``call`` runs on the module at ``path``; ``first``: before hooks that are there."""

    path: str
    when: When
    call: Callable[..., Any]
    first: bool = False


def install(model: nn.Module, hooks: Iterable[Hook], parts: Parts) -> None:
    """Register the rows in their order, and remember the handles by which ours are told from a script's."""
    for hook in hooks:
        module = model.get_submodule(hook.path)
        if hook.when in ("before", "before, with kwargs"):
            with_kwargs = hook.when == "before, with kwargs"
            handle = module.register_forward_pre_hook(hook.call, prepend=hook.first, with_kwargs=with_kwargs)
        else:
            always = hook.when == "after, always"
            handle = module.register_forward_hook(hook.call, prepend=hook.first, always_call=always)
        parts.our_hooks.add(handle.id)


def table(model: nn.Module, plan: Plan, parts: Parts, state: ModelState, guard: BatchGuard) -> Iterator[Hook]:
    """All rows for ``model``, of which this rank computes what is in ``plan``."""
    yield from computing(model, parts)
    yield from _direct_calls(plan, parts, state)
    yield from _model(model, state, guard)
    yield from _own_forwards(model, parts, state)


def computing(model: nn.Module, parts: Parts) -> Iterator[Hook]:
    """The rows that change what is computed; the others watch over a run."""
    yield from _blocks(model, parts)
    yield from _dropouts(parts)
    yield from _residuals(parts)
    yield from _stacks(parts)
    yield from _outputs(parts)
    yield from _vocabulary(parts)


def _direct_calls(plan: Plan, parts: Parts, state: ModelState) -> Iterator[Hook]:
    for path in dict.fromkeys((*parts.blocks, *plan.embeddings, *parts.heads)):
        step = DirectCall(state.runtime.region)
        yield Hook(path, "before", step.enter, first=True)
        yield Hook(path, "after, always", step.leave)


def _blocks(model: nn.Module, parts: Parts) -> Iterator[Hook]:
    for path, block in parts.blocks.items():
        plan, module = block.plan, model.get_submodule(path)
        if plan.inputs:
            yield Hook(plan.entry, "before, with kwargs", block.enter)
        else:
            yield Hook(path, "before", block.start)
        for below in plan.input_of:
            yield Hook(below, "before", functools.partial(block.enter_linear, module))
        for below in plan.output_of:
            yield Hook(below, "after", functools.partial(block.enter_output, module))
        if plan.output_is_partial:
            yield Hook(path, "after", block.sum_output)
        yield Hook(path, "after, always", block.leave)


def _dropouts(parts: Parts) -> Iterator[Hook]:
    for path, dropout in parts.dropouts.items():
        yield Hook(path, "before", dropout.before)
        yield Hook(path, "after, always", dropout.after)


def _residuals(parts: Parts) -> Iterator[Hook]:
    for path, residual in parts.residuals.items():
        yield Hook(path, "before", residual.begin)
        yield Hook(path, "after, always", residual.end)


def _stacks(parts: Parts) -> Iterator[Hook]:
    for one in parts.stacks:
        yield Hook(one.layers[0], "before, with kwargs", one.stack.split, first=True)
        for path, region in one.regions.items():
            yield Hook(path, "before, with kwargs", region.before)
            yield Hook(path, "after, always", region.after)
            yield Hook(path, "after, always", one.stack.abandon)
        yield Hook(one.layers[-1], "after", one.stack.join)


def _outputs(parts: Parts) -> Iterator[Hook]:
    for path, outputs in parts.outputs.items():
        yield Hook(path, "after", outputs, first=True)


def _vocabulary(parts: Parts) -> Iterator[Hook]:
    for path, columns in parts.heads.items():
        yield Hook(path, "before", columns.before)
        yield Hook(path, "after", columns.after, first=True)


def _model(model: nn.Module, state: ModelState, guard: BatchGuard) -> Iterator[Hook]:
    yield Hook("", "before", _reattach, first=True)
    yield Hook("", "before, with kwargs", guard.open, first=True)
    yield Hook("", "after, always", guard.close)
    inner = _inner(model)
    if inner is not None:
        yield Hook(inner, "before, with kwargs", guard.open_inner, first=True)
        yield Hook(inner, "after, always", guard.close_inner)


def _own_forwards(model: nn.Module, parts: Parts, state: ModelState) -> Iterator[Hook]:
    region, plan = state.runtime.region, state.plan
    own = own_forwards(model, plan, [layer for one in parts.stacks for layer in one.layers])
    for path in called_by_them(model, own, plan):
        step = DirectCall(region)
        yield Hook(path, "before", step.enter, first=True)
        yield Hook(path, "after, always", step.leave)
    for path in own:
        runs_untraced(type(model.get_submodule(path)).forward)
        lines = OwnForward(region)
        yield Hook(path, "before", lines.enter)
        yield Hook(path, "after, always", lines.leave, first=True)


def _reattach(model: nn.Module, args: object) -> None:
    state: ModelState = model.tp_record  # type: ignore[assignment]  # the copy's own
    state.reattach()


def _inner(model: nn.Module) -> str | None:
    """The path of what a wrapper may call without the model: its base model, or of a base model its input embedding.

    (A wrapper may call a base model's ``forward``, which runs none of its hooks.)
    """
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(base, nn.Module) or base is model:
        with contextlib.suppress(NotImplementedError, AttributeError):
            base = model.get_input_embeddings()  # type: ignore[operator]
    return next((path for path, module in model.named_modules() if path and module is base), None)
