"""The collectives as operators: torch.compile keeps each as one call in its graph, which runs as it does in eager mode.

Functional, so that no pass has to know of aliases; without gradients, for the formulas are those of
:mod:`tp_plugin.tensor.regions`. A group goes by its name in the mesh: a graph outlives no mesh, but its code may.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_run: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {}


def implement(**doings: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Say what each operator does with a group's name and a tensor (:mod:`tp_plugin.mesh.groups`)."""
    _run.update(doings)


@torch.library.custom_op("tp_plugin::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """The sum of ``x`` over the group."""
    return _run["all_reduce"](group, x)


@torch.library.custom_op("tp_plugin::all_gather", mutates_args=())
def all_gather(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(…) of each rank → (size, …)."""
    return _run["all_gather"](group, x)


@torch.library.custom_op("tp_plugin::reduce_scatter", mutates_args=())
def reduce_scatter(parts: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(size, …) → the sum over the ranks of this rank's part (…)."""
    return _run["reduce_scatter"](group, parts)


@all_reduce.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@all_gather.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return x.new_empty((size, *x.shape))


@reduce_scatter.register_fake
def _(parts: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return parts.new_empty(parts.shape[1:])
