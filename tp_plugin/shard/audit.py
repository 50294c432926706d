"""The audit: do all ranks of a TP group hold the same values where they should?"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.dtensor_utils import all_rows, held, is_split
from tp_plugin.shard.model_state import ModelState, checksum
from tp_plugin.shard.params import plain_name
from tp_plugin.tensor.on_shards import on_shards

logger = logging.getLogger(__name__)


class Replica(NamedTuple):
    """Elements that several TP ranks hold.

    Attributes:
        name: the parameter's.
        ranks: the TP ranks.
        views: the elements here.
        writable: whether the views are of the parameter's own memory.
    """

    name: str
    ranks: tuple[int, ...]
    views: list[torch.Tensor]
    writable: bool = True


@on_shards
def audit(state: ModelState, tolerance: float, repair: bool) -> None:
    """Compare replicated parameters, and replicated elements of shards, over the TP group; also those beside the model.

    Checksums travel first. Where they differ, the values of the first rank do, too.

    Args:
        tolerance: largest difference relative to the parameter's largest element that is rounding, not drift.
        repair: give all ranks the first one's values where they differ.

    Raises:
        DivergenceError: on every rank, naming the first parameter beyond the tolerance, and by how much.
    """
    differing = _differing(state)
    if not differing:
        return
    repair = repair and all(replica.writable for replica in differing)
    worst = _how_far(state, differing, repair)
    name, far = next(((name, far) for name, far in worst if not far <= tolerance), max(worst, key=lambda one: one[1]))
    if far <= tolerance or repair:
        if state.mesh.is_leader:
            logger.warning(
                f"replicated parameter {name!r} differs within the TP group by {far:.2g} of its largest element "
                f"({len(differing)} parameters differ); "
                + ("all ranks have the first one's values now" if repair else "that is rounding")
            )
        return
    raise DivergenceError(
        f"replicated parameter {name!r} has drifted apart within the TP group, by {far:.2g} of its largest element "
        f"(tolerance {tolerance:.0e}); it was updated differently on each rank. Look for code that changes weights by "
        "RANK, with a generator that differs between ranks, or by a norm or a sum of this rank's shares (clipping by "
        "hand: clip_grad_norm_ sees the whole model); "
        "`tp_plugin: {audit_repair: true}` gives all ranks the first one's values"
    )


def drift(state: ModelState) -> float:
    """The largest difference between replicas, relative to their parameter's largest element. Collective."""
    return max((far for _, far in _how_far(state, _differing(state), repair=False)), default=0.0)


def _differing(state: ModelState) -> list[Replica]:
    mesh = state.mesh
    replicas = list(_replicas(state))
    sums = [_checksum(replica.views) for replica in replicas]
    everyone = torch.stack(mesh.unit_cpu.all_gather(torch.tensor(sums, dtype=torch.int64, device="cpu")))
    return [
        replica
        for column, replica in enumerate(replicas)
        if len(set(everyone[list(replica.ranks), column].tolist())) > 1
    ]


def _how_far(state: ModelState, differing: list[Replica], repair: bool) -> list[tuple[str, float]]:
    """Names and relative differences, the same on all ranks of the unit."""
    if not differing:
        return []
    found = [_difference(state, replica, repair) for replica in differing]
    largest = torch.tensor(state.mesh.unit_cpu.gather_objects(found), device="cpu").amax(0).tolist()
    return [(replica.name, far) for replica, far in zip(differing, largest, strict=True)]


def _replicas(state: ModelState) -> Iterator[Replica]:
    unit = state.mesh.unit
    everyone = tuple(range(unit.size))
    for name, parameter in state.index.tensors().items():
        layout = state.index.layouts[name]
        if not layout.is_sharded:
            yield Replica(name, everyone, [held(parameter.detach())])
        for ranks in layout.replica_groups:
            assert layout.dim is not None
            ranges = layout.replicated_in(unit.rank, ranks) if unit.rank in ranks else ()
            local = all_rows(parameter.detach()) if ranges else parameter.detach()
            views = [local.narrow(layout.dim, a, b - a) for a, b in ranges]
            yield Replica(name, ranks, views, writable=not is_split(parameter))
    for name, parameter in _beside(state).items():
        yield Replica(name, everyone, [held(parameter.detach())])


def _beside(state: ModelState) -> dict[str, torch.Tensor]:
    """Trained parameters of the wrapper that are in none of its sharded models: full, and equal on all ranks."""
    wrapper = state.wrapper()
    if wrapper is None:
        return {}
    sharded = [module for module in wrapper.modules() if getattr(module, "tp_record", None) is not None]
    inside = {id(parameter) for module in sharded for parameter in module.parameters()}
    named = wrapper.named_parameters()
    return {plain_name(name): p for name, p in named if p.requires_grad and id(p) not in inside}


def _checksum(views: list[torch.Tensor]) -> int:
    found = 0
    for view in views:
        found = checksum(view, found)
    return found


def _difference(state: ModelState, replica: Replica, repair: bool) -> float:
    """How far this rank is from the first of the replica's, relative to the largest element there. Collective."""
    if state.mesh.unit.rank not in replica.ranks:
        return 0.0
    group = state.mesh.replicas(replica.ranks)
    far = 0.0
    for view in replica.views:
        theirs = group.broadcast(view.clone(memory_format=torch.contiguous_format))
        if view.numel():
            scale = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
            far = max(far, ((view - theirs).abs().max() / scale).item())
        if repair:
            view.copy_(theirs)
    return far
