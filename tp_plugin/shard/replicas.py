"""Before slicing, every rank of the TP group must hold the same whole model: the leader's."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set

import torch
from torch import nn

from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.shard.lazy_load import LazyParameter, identity, materialize_
from tp_plugin.shard.model_state import checksum
from tp_plugin.shard.quantized import whole_statistics


def agree_on_weights(
    model: nn.Module,
    mesh: Mesh,
    settled: Set[int] = frozenset(),
    *,
    layouts: Mapping[int, ParamLayout] | None = None,
    whole_world: bool = False,
) -> set[int]:
    """Give every rank of the TP group its leader's parameters and buffers, one after the other.

    Checksums are compared first, so a model that all ranks loaded from one checkpoint moves nothing; of a tensor that
    still is a part of its file, the file's identity, so it is not even read.

    Args:
        settled: ids of parameters that are sharded already and must stay as they are.
        layouts: by id, of parameters that are about to be sliced: of those that differ a rank takes its share only.
        whole_world: the leader is the world's first rank, which may be the only one that has loaded the model.

    Returns:
        The ids of parameters of which this rank has got its share.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= whole_statistics(model)
    tensors = {name: tensor for name, tensor in tensors.items() if id(tensor) not in settled}
    return _agree(tensors, mesh, layouts or {}, whole_world and mesh.dp_size > 1)


def agree_on(tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> None:
    """The same for some tensors by name, whole; collective over the unit."""
    _agree(tensors, mesh, {}, False)


@torch.no_grad()
def _agree(
    tensors: Mapping[str, torch.Tensor], mesh: Mesh, layouts: Mapping[int, ParamLayout], whole_world: bool
) -> set[int]:
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not tensors:
        return set()
    differing = _differing([_known(tensor) for tensor in tensors.values()], mesh, whole_world)
    names = [name for name, differs in zip(tensors, differing, strict=True) if differs]
    if names:  # it may lie in two copies of one file, or in memory on one rank and in a file on another
        differing = _differing([_checksum(tensors[name]) for name in names], mesh, whole_world)
        names = [name for name, differs in zip(names, differing, strict=True) if differs]
    shared = set()
    for name in names:
        tensor, layout = tensors[name], layouts.get(id(tensors[name]))
        taken = _leaders(tensor, layout or ParamLayout.replicated(tensor.shape, mesh.unit_size), mesh, whole_world)
        if layout is None:
            tensor.copy_(taken)
        else:
            take_share_(tensor, layout, mesh.unit.rank, taken.to(tensor.device))  # type: ignore[arg-type]
            shared.add(id(tensor))
    return shared


def _leaders(tensor: torch.Tensor, layout: ParamLayout, mesh: Mesh, whole_world: bool) -> torch.Tensor:
    """This rank's share of the leader's ``tensor``: whole ones go through the leader's unit, shares from there on."""
    rank = mesh.unit.rank
    if not whole_world or mesh.data.rank == 0:
        if mesh.is_leader:
            whole = value_of(tensor).detach().to(tensor.device).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        share = layout.shard(mesh.unit_for(whole).broadcast(whole), rank)
        share = share.clone() if share is whole else share  # what it is taken from may be a part of a file
    else:
        share = torch.empty(layout.local_shape(rank), dtype=tensor.dtype, device="cpu")
    if whole_world:
        device = torch.device("cpu") if mesh.data.takes_host else torch.device(mesh.devices.device_type)
        share = mesh.data.broadcast(share.to(device).contiguous())
    return share


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, for one use: one that is to lie on a device is not sent there whole for this."""
    return tensor.on_host() if isinstance(tensor, LazyParameter) else tensor


def take_share_(parameter: nn.Parameter, layout: ParamLayout, rank: int, share: torch.Tensor) -> None:
    """Make ``parameter`` (the same object) this rank's ``share``, its gradient too."""
    grad, parameter.grad = parameter.grad, None
    materialize_(parameter, share)
    if grad is not None:
        parameter.grad = layout.shard(grad, rank)


def _known(tensor: torch.Tensor) -> int:
    bytes_of = identity(tensor)
    # a checksum has 32 bits: an identity is never taken for one
    return _checksum(tensor) if bytes_of is None else 1 << 32 | zlib.crc32(repr(bytes_of).encode())


def _checksum(tensor: torch.Tensor) -> int:
    return checksum(value_of(tensor))


def _differing(mine: list[int], mesh: Mesh, whole_world: bool) -> list[int]:
    """Which of these numbers differ in the unit, or anywhere in the world."""
    values = torch.tensor(mine, dtype=torch.int64, device="cpu")
    unequal = (torch.stack(mesh.unit_cpu.all_gather(values)) != values).any(dim=0)
    if whole_world:  # by objects: the data group may take no tensors in host memory
        unequal |= (torch.tensor(mesh.data.gather_objects(mine), device="cpu") != values).any(dim=0)
    found = mesh.unit_cpu.all_reduce(unequal.to(torch.int64)).tolist()
    if not whole_world:
        return found
    return [sum(flags) for flags in zip(*mesh.data.gather_objects(found), strict=True)]
