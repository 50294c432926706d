"""Nodes of autograd's graph in Python, and backward passes that may not be differentiated again.

A collective inside of ``backward`` is invisible to autograd: with ``create_graph=True`` the second derivative would be
that of this rank's part, and silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tp_plugin.errors import TPError

Backward = TypeVar("Backward", bound=Callable[..., Any])


def first_order(backward: Backward) -> Backward:
    """``torch.autograd.function.once_differentiable``, with an error that says whose it is.

    Raises:
        TPError: when a second derivative comes through the gradients that ``backward`` returned.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        # compiled graphs have no second derivatives anyhow, and the compiler traces this
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not any(isinstance(grad, torch.Tensor) and grad.requires_grad for grad in grads):
            return found
        several = isinstance(found, tuple)
        marked = _Refusal.apply(*(_leaf(grad) for grad in (found if several else (found,))))
        return marked if several else marked[0]

    return run  # type: ignore[return-value]


def refuse_second_order(grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...] | None:
    """The same for a node of torch's own: a hook before it."""
    if not torch.is_grad_enabled() or not any(grad is not None and grad.requires_grad for grad in grads):
        return None
    marked: tuple[torch.Tensor, ...] = _Refusal.apply(*map(_leaf, grads))
    return marked


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without its look at each argument for what ``torch.func`` has left there."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _leaf(grad: torch.Tensor | None) -> torch.Tensor | None:
    return None if grad is None else grad.detach().requires_grad_()


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise TPError(
            "second derivatives (create_graph=True, as for a gradient penalty) are not computed through "
            "tensor-parallel layers; run with tp_size 1, or put the model's type into `tp_plugin: {leave_whole: […]}`"
        )
