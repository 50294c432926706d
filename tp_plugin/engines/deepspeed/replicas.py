"""Gradients of replicated elements are equal on the ranks of a TP group when DeepSpeed steps, wherever it keeps them.

ZeRO leaves each rank of a data group a part of them. The ranks of a TP group have the same parts of what all of them
hold whole, unless ZeRO 1 and 2 have cut a flat tensor of uneven shards. Where they have not, and for shards that ranks
share, the parts are put together over the data group, agreed on, and taken apart again.

Not of stages, nor where ZeRO has moved gradients to the host: the audit watches over those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tp_plugin.engines.patching import wrap
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.runtime import current
from tp_plugin.shard.gradients import agree, agree_once
from tp_plugin.tensor.param_entry import layout_of


def install(engine: Any) -> None:
    """Patch ``deepspeed.runtime.engine``: the step at the end of an accumulation."""
    wrap(engine.DeepSpeedEngine, "_take_model_step", _take_model_step)


def _take_model_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = current()
    if runtime is not None:
        averaged = getattr(self.optimizer, "averaged_gradients", None)
        if hasattr(self.optimizer, "bf16_groups"):
            agree(_flat_bf16(self.optimizer), runtime.mesh)
        elif averaged is None:
            agree_once(self.module.parameters(), runtime)
        else:
            _agree_on_parts(self.optimizer, averaged, runtime.mesh)
    report = None if runtime is None else runtime.progress.memory_report
    if report is not None:
        report.before_step(self)
    result = original(self, *args, **kwargs)
    if runtime is not None:
        runtime.progress.end_first_step()
    if report is not None:
        report.after_step(self)
    return result


def _flat_bf16(optimizer: Any) -> list[tuple[ParamLayout | None, torch.Tensor]]:
    pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    both = (pair for group, grads in pairs for pair in zip(group, grads, strict=True))
    return [(layout_of(parameter), grad.view(parameter.shape)) for parameter, grad in both]


class Part(NamedTuple):
    """What this rank has of a gradient: ``grad``, from element ``start`` on."""

    parameter: Any
    start: int
    grad: torch.Tensor


def _parts(optimizer: Any, number: int, grads: Sequence[torch.Tensor]) -> Iterator[Part]:
    """The parts of a group of parameters that this rank has."""
    grads = [grad for grad in grads if not getattr(grad, "_zero_padding", False)]
    if not hasattr(optimizer, "params_in_partition"):  # ZeRO 3: an equal part of each parameter, filled up at the end
        rank = torch.distributed.get_rank(optimizer.dp_process_group)
        for parameter, grad in zip(optimizer.fp16_groups[number], grads, strict=True):
            start = rank * grad.numel()
            yield Part(parameter, start, grad.view(-1)[: max(0, parameter.ds_numel - start)])
        return
    start = int(optimizer.first_offset[number])
    for parameter, grad in zip(optimizer.params_in_partition[number], grads, strict=False):
        yield Part(parameter, start, grad.view(-1))
        start = 0


def _agree_on_parts(optimizer: Any, averaged: Any, mesh: Mesh) -> None:
    flat_over_all = hasattr(optimizer, "params_in_partition")
    groups = optimizer.bit16_groups if flat_over_all else optimizer.fp16_groups
    cut_alike = not flat_over_all or not any(_is_uneven(layout_of(p), mesh) for group in groups for p in group)
    alike: list[tuple[ParamLayout | None, torch.Tensor]] = []
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, group in enumerate(groups):
        grads = averaged.get(number)
        if grads is None:
            continue
        layouts = {id(p): layout_of(p) for p in group}
        parts = list(_parts(optimizer, number, grads))
        whole = [p for p in group if _is_whole(layouts[id(p)], mesh)]
        apart = [p for p in group if not _is_whole(layout := layouts[id(p)], mesh) and layout.replica_groups]
        if cut_alike:
            held = set(map(id, whole))
            alike += [(layouts[id(p)], grad) for p, _, grad in parts if id(p) in held]
        else:
            apart = whole + apart
        if not apart or mesh.pp_size > 1:  # stages cut their gradients differently
            continue
        sizes = [getattr(p, "ds_numel", p.numel()) for p in apart]
        flat = torch.zeros(sum(sizes), dtype=grads[0].dtype, device=grads[0].device)
        views = dict(zip(map(id, apart), flat.split(sizes), strict=True))
        mine = [(views[id(p)].narrow(0, start, g.numel()), g) for p, start, g in parts if id(p) in views]
        for view, grad in mine:
            view.copy_(grad)
        mesh.grad.all_reduce(flat)  # of zeros but for one rank each
        alike += [(layouts[id(p)], views[id(p)].view(getattr(p, "ds_shape", p.shape))) for p in apart]
        taken += mine
    agree(alike, mesh)
    for view, grad in taken:
        grad.copy_(view)


def _is_whole(layout: ParamLayout | None, mesh: Mesh) -> bool:
    """Whether the ranks of this TP group, and no others, have all of it."""
    return layout is None or layout.whole_on == _tp_group(mesh)


def _is_uneven(layout: ParamLayout | None, mesh: Mesh) -> bool:
    return layout is not None and len({layout.local_numel(rank) for rank in _tp_group(mesh)}) > 1


def _tp_group(mesh: Mesh) -> tuple[int, ...]:
    first = mesh.pp.rank * mesh.tp_size
    return tuple(range(first, first + mesh.tp_size))
