"""Gradients that the pipeline has or will compute by itself, given to autograd: DDP, ZeRO and accumulation see one
backward, in which each parameter gets its gradient once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.tensor.first_order import first_order

Gradients = list[torch.Tensor | None]


class Computed(torch.autograd.Function):
    """The loss of a step whose backward has run, for a gradient of 1; its own backward scales and hands out.

    Args (of ``apply``): the gradients, what is called before they are handed out, the loss, the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, gradients: Gradients, before: Callable[[], Any], loss: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients, ctx.before = gradients, before
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were handed out already: its backward was called a second time, which "
                "pipeline stages do not support"
            )
        gradients, ctx.gradients = ctx.gradients, None
        ctx.before()
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad.to(gradient.dtype))
        return None, None, None, *gradients


class Late(torch.autograd.Function):
    """Outputs whose backward runs that of all micro-batches.

    Args (of ``apply``): what computes the parameters' gradients from those of the outputs, how many outputs, the
    outputs, the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, backward: Callable[[Sequence[torch.Tensor | None]], Gradients], count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.run, ctx.count = backward, count
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run, ctx.run = ctx.run, None
        if run is None:
            raise RuntimeError(
                "the backward of these outputs was called a second time, which pipeline stages do not support"
            )
        return None, None, *[None] * ctx.count, *run(grads)


class Spent(torch.autograd.Function):
    """An output of a step whose backward has run already."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        raise TPError(
            "a loss of the script's own goes back through the outputs of a forward with labels, whose backward the "
            "pipeline has run already, for the model's own loss: call the model without labels, or write "
            "`tp_plugin: {pipeline_schedule: gpipe}`"
        )
