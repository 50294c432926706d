"""Before slicing, every rank of the TP group must hold the same whole model: the leader's."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set

import torch
from torch import nn

from tp_plugin.mesh.roles import Mesh
from tp_plugin.shard.lazy_load import LazyParameter, identity
from tp_plugin.shard.model_state import checksum


def agree_on_weights(model: nn.Module, mesh: Mesh, settled: Set[int] = frozenset()) -> list[str]:
    """Give every rank of the TP group its leader's parameters and buffers; returns the names that differed.

    Checksums are compared first, so a model that all ranks loaded from one checkpoint moves nothing; of a tensor that
    still is a part of its file, the file's identity, so it is not even read. ``settled`` holds the ids of parameters
    that are sharded already and must stay as they are.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return agree_on({name: tensor for name, tensor in tensors.items() if id(tensor) not in settled}, mesh)


def agree_on(tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> list[str]:
    """The same for some tensors by name; collective over the unit."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not tensors:
        return []
    differing = _differing([_known(tensor) for tensor in tensors.values()], mesh)
    names = [name for name, differs in zip(tensors, differing, strict=True) if differs]
    if names:  # it may lie in two copies of one file, or in memory on one rank and in a file on another
        differing = _differing([_checksum(tensors[name]) for name in names], mesh)
        names = [name for name, differs in zip(names, differing, strict=True) if differs]
    with torch.no_grad():
        for name in names:
            leaders = tensors[name].detach().clone(memory_format=torch.contiguous_format)
            tensors[name].copy_(mesh.unit_for(leaders).broadcast(leaders))
    return names


def _known(tensor: torch.Tensor) -> int:
    bytes_of = identity(tensor)
    # a checksum has 32 bits: an identity is never taken for one
    return _checksum(tensor) if bytes_of is None else 1 << 32 | zlib.crc32(repr(bytes_of).encode())


def _checksum(tensor: torch.Tensor) -> int:
    # one that is to lie on a device is not sent there whole for this
    return checksum(tensor.on_host() if isinstance(tensor, LazyParameter) else tensor)


def _differing(mine: list[int], mesh: Mesh) -> list[int]:
    values = torch.tensor(mine, dtype=torch.int64, device="cpu")
    unequal = (torch.stack(mesh.unit_cpu.all_gather(values)) != values).any(dim=0)
    return mesh.unit_cpu.all_reduce(unequal.to(torch.int64)).tolist()
