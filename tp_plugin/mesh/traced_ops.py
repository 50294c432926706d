"""The collectives as operators: torch.compile keeps each as one call in its graph, which runs as it does in eager mode.

Functional, so that no pass has to know of aliases; without gradients, for the formulas are those of
:mod:`tp_plugin.tensor.regions`. A graph holds a group by its name, as torch's own functional collectives do.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch


class TracedGroup(Protocol):
    """What runs an operator when the graph does."""

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, as a tensor of its own."""

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors as one."""

    def reduce_scatter(self, chunks: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' chunks for this rank."""


groups: MutableMapping[str, Any] = WeakValueDictionary()
"""Live groups by the name under which graphs know them."""


@torch.library.custom_op("tp_plugin::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """The sum of ``x`` over the group."""
    summed: torch.Tensor = groups[group].summed(x)
    return summed


@torch.library.custom_op("tp_plugin::all_gather", mutates_args=())
def all_gather(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(…) of each rank → (size, …)."""
    gathered: torch.Tensor = groups[group].gathered(x)
    return gathered


@torch.library.custom_op("tp_plugin::reduce_scatter", mutates_args=())
def reduce_scatter(chunks: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(size, …) → the sum over the ranks of this rank's chunk (…)."""
    mine: torch.Tensor = groups[group].reduce_scatter(chunks)
    return mine


@all_reduce.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@all_gather.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return x.new_empty((size, *x.shape))


@reduce_scatter.register_fake
def _(chunks: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return chunks.new_empty(chunks.shape[1:])
