"""FSDP2's parameters: DTensors that hold some rows (dimension 0) of this TP rank's tensor, split over the data group.

A DTensor's own ``shape`` is that of the TP rank's tensor. Known by their attributes: torch's DTensor need not be
imported by a run that has none.
"""

from __future__ import annotations

from typing import Any

import torch


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
    ranks, rows = tensor.device_mesh, tensor.shape[0]
    each = -(-rows // ranks.size())
    start = min(rows, each * ranks.get_local_rank())
    return start, min(rows, start + each)


def all_rows(tensor: Any) -> torch.Tensor:
    """The TP rank's full tensor. Collective over the data group."""
    if not is_split(tensor):
        return tensor  # type: ignore[no-any-return]
    if tensor.device_mesh.size() == 1:
        return tensor._local_tensor  # type: ignore[no-any-return]
    return tensor.full_tensor()  # type: ignore[no-any-return]


def split_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A TP rank's full tensor as a DTensor laid out like ``like``, with memory of its own; no communication."""
    from torch.distributed.tensor import DTensor

    start, stop = held_rows(like) or (0, tensor.shape[0])
    mine = tensor[start:stop].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
