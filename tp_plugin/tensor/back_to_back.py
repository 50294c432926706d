"""Weights that lie back to back in one storage, so that their linears run as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def back_to_back(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The weights (out, in), one below the other, if they lie so in one storage."""
    first = weights[0]
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        alike = weight.dtype == first.dtype and weight.shape[1:] == first.shape[1:] and weight.is_contiguous()
        if not alike or weight.data_ptr() != address or weight.untyped_storage().data_ptr() != storage:
            return None
        address += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def put_back_to_back(weights: Sequence[nn.Parameter]) -> None:
    """Make :func:`back_to_back` weights of some that lie in storages of their own; the Parameter objects stay."""
    with torch.no_grad():
        flat = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, flat.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part
