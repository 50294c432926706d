"""FSDP2's parameters: DTensors that hold some rows (dimension 0) of this TP rank's tensor, split over the DP group.

A DTensor's own ``shape`` is that of the TP rank's tensor. Known by their attributes: torch's DTensor need not be
imported by a run that has none.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.mesh.groups import current_mesh, require_mesh


def is_split(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is one of them."""
    return hasattr(tensor, "_local_tensor")


def held(tensor: Any) -> torch.Tensor:
    """What this rank holds of ``tensor``: its rows, or all of an ordinary tensor."""
    local: torch.Tensor = tensor._local_tensor if is_split(tensor) else tensor
    return local


def held_rows(tensor: Any) -> tuple[int, int] | None:
    """Which rows of the TP rank's tensor those are; None: all.

    As ``torch.chunk`` cuts them, which is what FSDP2 does: the last ranks may hold fewer, or none.
    """
    if not is_split(tensor):
        return None
    dp, rows = require_mesh().dp, tensor.shape[0]
    each = -(-rows // dp.size)
    start = min(rows, each * dp.rank)
    return start, min(rows, start + each)


def joined(tensor: Any) -> torch.Tensor:
    """The TP rank's whole tensor. Collective over the DP group."""
    if not is_split(tensor):
        return tensor  # type: ignore[no-any-return]
    mesh, local, rows = current_mesh(), tensor._local_tensor, tensor.shape[0]
    if mesh is None:
        return tensor.full_tensor()  # type: ignore[no-any-return]
    if mesh.dp_size == 1:
        return local  # type: ignore[no-any-return]
    sent = local.new_zeros((-(-rows // mesh.dp_size), *tensor.shape[1:]))
    sent[: len(local)] = local
    return torch.cat(mesh.dp.all_gather(sent))[:rows]


def split_like(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """A TP rank's whole tensor as a DTensor laid out like ``like``, with memory of its own; no communication."""
    from torch.distributed.tensor import DTensor

    start, stop = held_rows(like) or (0, whole.shape[0])
    mine = whole[start:stop].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
