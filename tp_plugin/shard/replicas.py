"""Before slicing, every rank of the TP group must hold the same whole model: the leader's."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from tp_plugin.parallel.mesh import Mesh
from tp_plugin.shard.record import checksum


def agree_on_weights(model: nn.Module, mesh: Mesh, settled: Set[int] = frozenset()) -> list[str]:
    """Give every rank of the TP group its leader's parameters and buffers; returns the names that differed.

    Checksums are compared first, so a model that all ranks loaded from one checkpoint moves nothing. ``settled`` holds
    the ids of parameters that are sharded already and must stay as they are.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel() and id(tensor) not in settled}
    if not tensors:
        return []
    mine = torch.tensor([checksum(tensor) for tensor in tensors.values()], dtype=torch.int64)
    unequal = (torch.stack(mesh.control.all_gather(mine)) != mine).any(dim=0)
    differing = mesh.control.all_reduce(unequal.to(torch.int64)).tolist()
    names = [name for name, differs in zip(tensors, differing, strict=True) if differs]
    with torch.no_grad():
        for name in names:
            leaders = tensors[name].detach().clone(memory_format=torch.contiguous_format)
            tensors[name].copy_(mesh.tp_for(leaders).broadcast(leaders))
    return names
