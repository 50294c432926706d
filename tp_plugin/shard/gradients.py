"""Before an optimizer steps, gradients of replicated elements are the leader's on all ranks, to the last bit.

Ranks compute them alike, but kernels that were compiled per rank, uneven shards and reductions over other ranks may
round them otherwise, and nothing would pull the parameters together again: they would drift apart. One collective per
dtype, and one more for each set of ranks that share a part of their shards.

Only rounding is taken back. A rank whose gradients are others (a script has scaled them by a norm of its shares) keeps
its own, and the guard finds the parameters apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from tp_plugin.mesh.buckets import buckets
from tp_plugin.mesh.dtensor_utils import held, held_rows
from tp_plugin.mesh.groups import Group
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.runtime import Runtime
from tp_plugin.tensor.on_shards import on_shards
from tp_plugin.tensor.param_entry import entry_of, layout_of

ROUNDING = 2.0**-7
"""Twice that of bf16, which may be anywhere on the way: norm of a difference, relative to that of the gradients."""


@on_shards
def agree_once(parameters: Iterable[Any], runtime: Runtime) -> None:
    """The gradients of ``parameters`` are made equal, if there was a backward since they last were. Collective.

    Nothing is done if they belong to no sharded model: one rank alone may train something of its own.
    """
    stamp, parameters = runtime.progress.backwards, list(parameters)
    if all(entry_of(parameter) is None for parameter in parameters):
        return
    new = [p for p in parameters if p.grad is not None and getattr(p, "tp_agreed", None) != stamp]
    for parameter in new:
        parameter.tp_agreed = stamp
    agree([(layout_of(parameter), parameter.grad) for parameter in new], runtime.mesh)


@on_shards
def agree(gradients: Sequence[tuple[ParamLayout | None, torch.Tensor]], mesh: Mesh) -> None:
    """Give all ranks the first holder's gradients, if theirs are these but for rounding. Collective.

    Args:
        gradients: with the layouts of their parameters; None: of a head beside the model, which all ranks have whole.
    """
    if mesh.unit.size > 1:
        for bucket in buckets(piece for layout, grad in gradients for piece in _replicated(layout, grad, mesh)):
            bucket.broadcast(ROUNDING)


def _replicated(layout: ParamLayout | None, grad: Any, mesh: Mesh) -> Iterator[tuple[Group, torch.Tensor]]:
    local = held(grad)
    on_host = local.device.type == "cpu"
    if layout is None or not layout.is_sharded:
        yield mesh.unit_cpu if on_host and not mesh.unit.takes_host else mesh.unit, local
        return
    assert layout.dim is not None
    me, rows = mesh.unit.rank, held_rows(grad)
    if me in layout.whole_on and rows is None:  # of a stage's ranks; it may be a piece of a flat gradient
        if len(layout.whole_on) > 1 and not (on_host and not mesh.unit.takes_host):
            yield mesh.replicas(layout.whole_on), local
        return
    for ranks in layout.replica_groups:
        if me not in ranks or (on_host and not mesh.unit.takes_host):
            continue
        ranges = layout.replicated_in(me, ranks)
        if rows is not None and layout.dim == 0:
            if len({(layout.local_shape(rank), layout.replicated_in(rank, ranks)) for rank in ranks}) > 1:
                continue  # FSDP2 has given the ranks different rows of what they share
            ranges = tuple((max(a, rows[0]) - rows[0], min(b, rows[1]) - rows[0]) for a, b in ranges)
        yield from ((mesh.replicas(ranks), local.narrow(layout.dim, a, b - a)) for a, b in ranges if a < b)
