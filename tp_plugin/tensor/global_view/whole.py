"""Whole tensors of shards and shards of whole ones, and numbers of all elements; gradients go where elements lie."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import all_rows, is_split, split_like
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.global_view.info import GlobalInfo, local_of
from tp_plugin.tensor.grad_norm import extreme, owned_part
from tp_plugin.tensor.regions import reduce_from_tp


def whole_of(tensor: Any, info: GlobalInfo, to_write: bool = False) -> torch.Tensor:
    """The whole tensor, on the device; with gradients recorded, one that sends them to the shards. Collective.

    FSDP2's rows are gathered over the data group first.
    """
    if not info.peers.meet(f"{info.name} to write" if to_write else info.name):
        return read_alone(tensor, info, to_write)
    local = local_of(tensor)
    if local.requires_grad and torch.is_grad_enabled():
        if is_split(local):  # the hook that sums is on the parameter that FSDP2 gathers for the forward
            local, info = _rows_with_gradient(local), replace(info, summed=False)
        return _Whole.apply(local, info)  # type: ignore[no-any-return]
    return _gathered(all_rows(local), info)


def _rows_with_gradient(local: Any) -> torch.Tensor:
    from torch.distributed.tensor import Replicate

    found: torch.Tensor = local.redistribute(placements=[Replicate()]).to_local()
    return found


def _gathered(local: torch.Tensor, info: GlobalInfo) -> torch.Tensor:
    if info.layout.dim is None:
        return local.clone()
    group = info.peers.mesh.unit_for(local)
    sizes = [info.layout.local_numel(rank) for rank in range(info.layout.ranks)]
    sent = local.new_zeros(max(sizes))  # all-gather takes equal lengths only
    sent[: local.numel()] = local.reshape(-1)
    received = group.all_gather(sent)
    shards = [flat[: sizes[rank]].view(info.layout.local_shape(rank)) for rank, flat in enumerate(received)]
    return info.layout.gather(shards)


def read_alone(tensor: Any, info: GlobalInfo, to_write: bool = False) -> torch.Tensor:
    """The whole tensor for the leader, which has found itself alone.

    Raises:
        TPError: the other ranks have none by whose name they could give it.
    """
    stale = info.made is not None and info.made != info.peers.stamp()
    if info.applied is None or stale or to_write or is_split(tensor):
        raise TPError(
            f"{info.peers.line()}: {info.describe()}, and the others are not at this line. On the main process alone "
            "parameters can be read, but neither gradients, nor what was computed of them or of several tensors, nor "
            "can anything be written: do that on every process, and log or print the result on the main one"
        )
    whole = info.peers.read(info.name)
    with torch.no_grad():
        for function in info.applied:
            whole = function(whole)
    return whole.to(tensor.device)


class _Whole(torch.autograd.Function):
    """Forward: the whole. Backward: each rank computes the same gradient of it, and takes its shard's."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, info: GlobalInfo) -> torch.Tensor:
        ctx.info = info
        return _gathered(local, info)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return share_of_gradient(grad, ctx.info), None


def share_of_gradient(grad: torch.Tensor, info: GlobalInfo) -> torch.Tensor:
    """This rank's part of a gradient that all ranks have whole, for a parameter whose hook may sum over ranks."""
    mine = info.layout.shard(grad, info.rank)
    if not info.summed:
        return mine
    if info.layout.dim is None:
        return mine if info.rank == 0 else torch.zeros_like(mine)
    counted = torch.zeros_like(mine)
    for to, part in zip(
        owned_part(counted, info.layout, info.rank), owned_part(mine, info.layout, info.rank), strict=True
    ):
        to.copy_(part)
    return counted


def shard_of(whole: torch.Tensor, info: GlobalInfo, like: Any) -> Any:
    """What this rank holds of ``whole``, as ``like`` does; communicates nothing."""
    mine = info.layout.shard(whole, info.rank) if info.layout.dim is not None else whole
    return split_like(mine, like) if is_split(like) else mine


def write(tensor: Any, whole: torch.Tensor, info: GlobalInfo) -> None:
    """Write this rank's part of ``whole`` into ``tensor``."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        tensor.copy_(shard_of(whole, info, tensor))
    info.peers.written(tensor)


def reduce(name: str, tensor: Any, info: GlobalInfo, order: float = 2.0, dtype: torch.dtype | None = None) -> Any:
    """One number of all elements, each counted once, by one all-reduce of a scalar; gradients reach this rank's.

    Args:
        name: one of :data:`tables.REDUCTIONS`.
        order: of a norm.
        dtype: of a sum or mean.
    """
    local = local_of(tensor)
    group = info.peers.mesh.unit_for(local)
    if info.layout.dim is None:
        parts = [local] if info.rank == 0 else []
    else:
        parts = [part for part in owned_part(local, info.layout, info.rank) if part.numel()]
    result_type = dtype or local.dtype
    wide = torch.float32 if result_type in (torch.float16, torch.bfloat16) else None

    def total(values: list[torch.Tensor], empty: torch.dtype) -> torch.Tensor:
        # of no element: a zero that still is in the graph of every rank, so that all ranks record the same reduction
        mine = torch.stack(values).sum() if values else local.new_zeros((), dtype=empty)
        return reduce_from_tp(mine, group)

    if name in ("norm", "linalg_vector_norm"):
        norms = [torch.linalg.vector_norm(part, order, dtype=wide) for part in parts]
        if order == 0:
            return total(norms, wide or local.dtype).to(result_type)
        start = local.new_full((), math.inf if order == -math.inf else 0.0, dtype=wide or local.dtype)
        mine = torch.linalg.vector_norm(torch.stack(norms), order) if norms else start
        # a norm of norms, of which this rank's is in the graph: at zero it has the gradient that torch gives
        everyone = group.all_gather(mine.detach())
        everyone[group.rank] = mine
        return torch.linalg.vector_norm(torch.stack(everyone), order).to(result_type)
    if name in ("sum", "mean"):
        whole = total([part.sum(dtype=wide or dtype) for part in parts], wide or _sum_type(result_type, dtype))
        if name == "mean":
            return (whole / torch.Size(info.shape).numel()).to(result_type)
        return whole.to(result_type) if wide is not None else whole
    if name == "count_nonzero":
        return total([torch.count_nonzero(part) for part in parts], torch.int64)
    if name == "any":
        return total([part.any().to(torch.int64) for part in parts], torch.int64) > 0
    if name == "all":
        return total([(~part.all()).to(torch.int64) for part in parts], torch.int64) == 0
    return _extreme(parts, name in ("max", "amax"), local, group)


def _sum_type(result: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked or (result if result.is_floating_point or result.is_complex else torch.int64)


def _extreme(parts: list[torch.Tensor], largest: bool, local: torch.Tensor, group: Any) -> torch.Tensor:
    floats = local.dtype.is_floating_point
    limits: Any = (
        torch.finfo(local.dtype) if floats else torch.iinfo(local.dtype) if local.dtype != torch.bool else None
    )
    least, most = (-math.inf, math.inf) if floats else (limits.min, limits.max) if limits is not None else (0, 1)
    found = [part.amax() if largest else part.amin() for part in parts]
    mine = torch.stack(found) if found else local.new_full((1,), least if largest else most)
    mine = (mine.amax() if largest else mine.amin()).detach()
    if floats:
        return extreme(mine, largest, group)
    sent = mine.to(torch.int64)
    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN
    return group.all_reduce(sent, operation).to(local.dtype)  # type: ignore[no-any-return]
