"""The collectives as operators: torch.compile keeps each as one call in its graph, which runs as it does in eager mode.

Functional, so that no pass has to know of aliases; without gradients, for the formulas are those of
:mod:`tp_plugin.tensor.regions`. A graph holds a group by its name, as torch's own functional collectives do.

Ranks must begin collectives in one order. Inductor schedules by the sizes of tensors, which differ between ranks whose
shards do: it is told that each of these operators comes after the one before it in the graph, of whatever group.
(Effect tokens would say the same, but torch 2.13's Inductor looks them up under other names than it notes them, takes
the operators inside for safe in CUDA graphs, and cannot recompute them in a checkpoint. Torch's own functional
collectives have an order, but run past :class:`~tp_plugin.mesh.groups.Group`, which counts and watches.)

They are Python, so a CUDA graph would replay none of them: their tag has Inductor cut its CUDA graphs around them, or
do without (``mode="reduce-overhead"``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
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


@torch.library.custom_op("tp_plugin::ordered_all_reduce", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """The sum of ``x`` over the group."""
    summed: torch.Tensor = groups[group].summed(x)
    return summed


@torch.library.custom_op("tp_plugin::ordered_all_gather", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def all_gather(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(…) of each rank → (size, …)."""
    gathered: torch.Tensor = groups[group].gathered(x)
    return gathered


@torch.library.custom_op("tp_plugin::ordered_reduce_scatter", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def reduce_scatter(chunks: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """(size, …) → the sum over the ranks of this rank's chunk (…)."""
    mine: torch.Tensor = groups[group].reduce_scatter(chunks)
    return mine


@all_reduce.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    keep_order()
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@all_gather.register_fake
def _(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    keep_order()
    return x.new_empty((size, *x.shape))


@reduce_scatter.register_fake
def _(chunks: torch.Tensor, group: str, size: int) -> torch.Tensor:
    keep_order()
    return chunks.new_empty(chunks.shape[1:])


OPERATORS = tuple(op._opoverload for op in (all_reduce, all_gather, reduce_scatter))


def keep_order() -> None:
    """Tell Inductor, if it is there. It is when the graph that it compiles is traced, as whose part this is called."""
    inductor: Any = sys.modules.get("torch._inductor.lowering")
    for operator in OPERATORS if inductor is not None else ():
        if operator not in inductor.lowerings:
            inductor.register_lowering(operator, type_promotion_kind=None)(_ordered(operator, inductor))


def _ordered(operator: Any, inductor: Any) -> Callable[..., Any]:
    fallback = inductor.fallback_handler(operator)

    def lower(*args: Any) -> Any:
        graph = inductor.V.graph
        before = len(graph.operations)
        result = fallback(*args)
        made = graph.operations[before:]
        for operation in made:
            if last := vars(graph).get("tp_last_collective"):
                graph.additional_buffer_deps[operation.get_operation_name()].add(last)
        graph.tp_last_collective = made[-1].get_name()
        return result

    return lower
