"""Norms of gradients (or parameters) that count every element of the full model once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tp_plugin.mesh.dtensor_utils import held, held_rows, is_split
from tp_plugin.mesh.groups import Group
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.on_shards import on_shards

Layouts = Sequence[ParamLayout | None]
"""The layout of each tensor's parameter; None for one of no sharded model, which counts as replicated."""


@on_shards
def total_norm(tensors: Sequence[torch.Tensor], layouts: Layouts, mesh: Mesh, norm_type: float = 2.0) -> torch.Tensor:
    """:func:`sharded_grad_norm` in the dtype of the gradients, in which torch's own norm is given."""
    norm = sharded_grad_norm(tensors, layouts, mesh, norm_type)
    return norm.to(functools.reduce(torch.promote_types, {t.dtype for t in tensors})) if tensors else norm


def sharded_grad_norm(
    tensors: Sequence[torch.Tensor], layouts: Layouts, mesh: Mesh, norm_type: float = 2.0
) -> torch.Tensor:
    """The ``norm_type`` norm of full gradients of which this rank holds ``tensors``; a scalar tensor.

    Sharded ones are summed over the TP group, replicated ones and replicas counted once. One all-reduce of one number
    (two for an infinite norm); its result is the same on every rank of the group to the last bit. What FSDP2 has split
    by rows is summed over the data group first, by another one.
    """
    if not tensors:
        return torch.tensor(0.0, device=torch.get_default_device())  # as torch's
    counted: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # by whether the data group has split it
    for tensor, layout in zip(tensors, layouts, strict=True):
        if not held(tensor).numel():
            continue
        if layout is not None and layout.is_sharded:
            counted[is_split(tensor)] += owned_part(tensor, layout, mesh.tp.rank)
        elif mesh.is_leader:
            counted[is_split(tensor)].append(held(tensor))
    device, wide = held(tensors[0]).device, _wide(tensors[0].dtype) or tensors[0].dtype
    infinite, largest = math.isinf(norm_type), norm_type > 0

    def together(values: torch.Tensor) -> torch.Tensor:
        return values.sum() if not infinite else values.max() if largest else values.min()

    def local(mine: list[torch.Tensor]) -> torch.Tensor:
        kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor in mine:
            if tensor.numel():  # FSDP2 may have left no row of what this rank owns
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        if not kinds:
            return torch.full((), math.inf if infinite and not largest else 0.0, dtype=wide, device=device)
        norms = [
            torch.stack(torch._foreach_norm(alike, norm_type, dtype=_wide(dtype))).to(device, wide)
            for (_, dtype), alike in kinds.items()
        ]
        values = torch.cat(norms) if len(norms) > 1 else norms[0]
        return together(values if infinite else values.pow(norm_type))

    def over(group: Group, value: torch.Tensor) -> torch.Tensor:
        return extreme(value, largest, group) if infinite else group.all_reduce(value)

    total = local(counted[False])
    if any(is_split(tensor) for tensor in tensors):
        total = together(torch.stack([total, over(mesh.data, local(counted[True]))]))
    # gradients that FSDP2 has offloaded lie on the host
    total = over(mesh.unit if total.device.type != "cpu" or mesh.unit.takes_host else mesh.unit_cpu, total)
    return total if infinite else total.pow(1.0 / norm_type)


def owned_part(tensor: torch.Tensor, layout: ParamLayout, rank: int) -> list[torch.Tensor]:
    """Views of the elements of a local tensor that count for ``rank``: the first holder of each element owns it."""
    assert layout.dim is not None
    ranges, rows = layout.owned(rank), held_rows(tensor)
    tensor = held(tensor)
    if rows is not None and layout.dim == 0:
        start, stop = rows
        ranges = tuple((max(a, start) - start, min(b, stop) - start) for a, b in ranges if a < stop and b > start)
    if ranges == ((0, tensor.shape[layout.dim]),):
        return [tensor]
    return [tensor.narrow(layout.dim, a, b - a) for a, b in ranges]


def not_owned(layout: ParamLayout, rank: int) -> list[tuple[int, int]]:
    """Ranges of a flat shard that another rank counts, merged; empty if this rank owns it all."""
    assert layout.dim is not None
    shape = layout.local_shape(rank)
    owned, size = layout.owned(rank), shape[layout.dim]
    edges = [0, *(edge for ranges in owned for edge in ranges), size]
    gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    inner = math.prod(shape[layout.dim + 1 :])
    found: list[tuple[int, int]] = []
    for outer in range(math.prod(shape[: layout.dim]) if gaps and inner else 0):
        for a, b in gaps:
            start, stop = (outer * size + a) * inner, (outer * size + b) * inner
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
    return found


def extreme(value: torch.Tensor, largest: bool, group: Group) -> torch.Tensor:
    """The largest (or the least) of the ranks' scalars, NaN if one is: a backend's MAX may lose it on some ranks."""
    signed = value if largest else -value
    pair = torch.stack([signed.nan_to_num(-math.inf, math.inf, -math.inf), value.isnan().to(value.dtype)])
    most, nans = group.all_reduce(pair, dist.ReduceOp.MAX)
    return torch.where(nans > 0, math.nan, most if largest else -most)


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    # sums of squares of 16-bit gradients are taken in fp32, so that 1 and tp ranks round alike
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
