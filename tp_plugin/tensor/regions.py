"""The two operators of Megatron-LM (Shoeybi et al. 2019, section 3) and what the vocabulary needs, with autograd.

``f`` (:func:`copy_to_tp`): identity forward, all-reduce backward; stands where activations enter a sharded block.
``g`` (:func:`reduce_from_tp`): all-reduce forward, identity backward; stands after a row-parallel product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor.first_order import apply, first_order, refuse_second_order

_SELECTIVE = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # a copy: autograd may hand the same gradient to another consumer
        if len(grads) == 1:
            return None, ctx.group.summed(grads[0])
        together = ctx.group.summed(torch.cat([grad.reshape(-1) for grad in grads]))
        parts = together.split([grad.numel() for grad in grads])
        return None, *(part.view(grad.shape) for part, grad in zip(parts, grads, strict=True))


class ReduceFromTP(torch.autograd.Function):
    """The node of :func:`reduce_from_tp`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return group.summed(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        return torch.cat(group.all_gather(x), dim=-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # every rank computed the same loss from the whole logits, so each takes its own columns of one gradient
        return grad.narrow(-1, ctx.group.rank * ctx.width, ctx.width).contiguous(), None


def copy_to_tp(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``f``: ``x`` itself; its gradient is summed over ``group``."""
    return copy_all_to_tp([x], group)[0]


def copy_all_to_tp(xs: Sequence[torch.Tensor], group: Group) -> list[torch.Tensor]:
    """``f`` for all inputs of one block: the gradients of one dtype and device are summed by one all-reduce."""
    entered = list(xs)
    kinds: dict[Any, list[int]] = {}
    for at, x in enumerate(xs):
        if group.size > 1 and x.requires_grad:
            kinds.setdefault((x.dtype, x.device), []).append(at)
    for places in kinds.values():
        for at, y in zip(places, apply(_CopyToTP, group, *(xs[at] for at in places)), strict=True):
            entered[at] = y
    return entered


def reduce_from_tp(x: torch.Tensor, group: Group, fresh: bool = False) -> torch.Tensor:
    """``g``: the sum of ``x`` over ``group``; the gradient passes unchanged.

    Args:
        fresh: the caller has just computed ``x`` by an operation that does not save its result, and nobody else has
            seen it: it is summed in place.
    """
    if group.size == 1:
        return x
    # a graph is functional, and its compiler reuses what is free; a view's base may be another's
    in_place = not torch.compiler.is_compiling() and fresh and x.is_contiguous() and not x._is_view()
    in_place = in_place and not torch._C._are_functorch_transforms_active()  # which a node of ours refuses
    if in_place and not (torch._C._len_torch_dispatch_stack() and _kept_by_checkpoints()):
        group.all_reduce(x.detach())  # the gradient passes unchanged: without a node of its own
        if x.grad_fn is not None:
            x.grad_fn.register_prehook(refuse_second_order)
        return x
    summed: torch.Tensor = apply(ReduceFromTP, x, group)
    return summed


def _kept_by_checkpoints() -> bool:
    """Whether selective checkpoints look on, which keep products as these are in the end, and give them once more."""
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


def gather_from_tp(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The tensors of all ranks concatenated along the last dimension, (…, n) → (…, n · size)."""
    return _GatherFromTP.apply(x, group) if group.size > 1 else x
