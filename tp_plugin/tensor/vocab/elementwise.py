"""Element-wise functions of deferred logits: casts, scaling, soft-capping, biases, and the terms of divergences.

Each rank computes them on its own columns, where and when these are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import Apply, Expr, Full, PerRow
from tp_plugin.tensor.vocab.logits import Logits, in_graph, incoming, new_strides
from tp_plugin.tensor.vocab.registry import HANDLERS, Handler, functions, handles
from tp_plugin.tensor.vocab.statistics import sum_rows


def elementwise(function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``function`` of at least one Logits and of other operands; NotImplemented if it cannot be deferred.

    Args:
        args: Logits of one shape, numbers, dtypes; tensors that every rank has: without dimensions, of a number for
            each token (…, 1), or of a number for each entry of the vocabulary. Logits and numbers per token may have
            a gradient, which is a sum over the vocabulary for the latter: one all-reduce in the backward.
    """
    first = next(arg for arg in args if isinstance(arg, Logits))
    parents = [_aligned(arg, first) for arg in args]
    operands = [_operand(parent, first) for parent in parents]
    if any(operand is NotImplemented for operand in operands):
        return NotImplemented
    dtype = function(*(_meta(operand, first.dim()) for operand in operands), **kwargs).dtype
    expr = Apply(function, tuple(operands), dtype, kwargs)
    held = tuple(one for arg in args if isinstance(arg, Logits) for one in arg.held)
    made = Logits.make(first.vocabulary, expr, new_strides(first), first.device, held)
    if not dtype.is_floating_point:
        return made
    positions = [at for at, operand in enumerate(operands) if isinstance(operand, Expr)]
    gradient = functools.partial(_gradient, positions, first.vocabulary)
    return in_graph(made, [parents[at] for at in positions], expr, gradient)


def _aligned(value: Any, logits: Logits) -> Any:
    """A tensor with as many dimensions as ``logits``, the vocabulary last; one number per token as (rows, 1)."""
    if not isinstance(value, torch.Tensor) or isinstance(value, Logits) or not 0 < value.dim() <= logits.dim():
        return value
    value = value[(None,) * (logits.dim() - value.dim())].movedim(logits.axis, -1)
    per_row = value.shape[-1] == 1 != logits.vocabulary.size
    fits = all(length in (1, full) for length, full in zip(value.shape, logits.lead, strict=False))
    return value.expand(*logits.lead, 1).reshape(-1, 1) if per_row and fits else value


def _operand(value: Any, logits: Logits) -> Any:
    """What :class:`Apply` takes for an aligned ``value``, or NotImplemented."""
    if isinstance(value, Logits):
        return value.expr if value.shape == logits.shape and value.axis == logits.axis else NotImplemented
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == (logits.rows, 1) and value.device == logits.device:
        return PerRow(value.detach())
    if value.requires_grad and torch.is_grad_enabled():
        return NotImplemented  # its gradient has columns of all ranks, or is a sum over all tokens
    if value.dim() == 0:
        return value.detach()
    *lead, last = value.shape
    fits = torch.Size(lead) == logits.lead or all(length == 1 for length in lead)
    if not fits or last != logits.vocabulary.size or value.device != logits.device:
        return NotImplemented
    return Full(value.detach().reshape(-1, last))


def _meta(operand: Any, dims: int) -> Any:
    """An operand without values, from which torch tells the result's dtype."""
    if not isinstance(operand, Expr | torch.Tensor):
        return operand
    return torch.empty((1,) * dims if isinstance(operand, Expr) else (), dtype=operand.dtype, device="meta")


def _gradient(positions: list[int], vocabulary: Any, expr: Apply, grad: Expr, at: int) -> Expr | torch.Tensor:
    found, operand = expr.gradient(positions[at], grad), expr.args[positions[at]]
    if not isinstance(operand, PerRow):
        return found
    return sum_rows(found, len(operand.data), vocabulary, operand.data.device).unsqueeze(-1).to(operand.dtype)


def _handler(func: Handler) -> Handler:
    def handler(*args: Any, **kwargs: Any) -> Any:
        is_plain = not any(isinstance(value, torch.Tensor) for value in kwargs.values())
        return elementwise(func, args, kwargs) if is_plain else NotImplemented

    return handler


for _func in functions(
    "add sub subtract mul multiply div divide true_divide rsub neg negative tanh exp "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __neg__"
):
    HANDLERS[_func] = _handler(_func)


def cast(logits: Logits, dtype: torch.dtype, copy: bool = False) -> Any:
    """``logits`` in ``dtype``; the same tensor if it has that."""
    if logits.dtype != dtype:
        return elementwise(torch.Tensor.to, (logits, dtype), {})
    return logits.clone() if copy else logits


for _name in ("float32 float", "float64 double", "float16 half", "bfloat16 bfloat16"):
    _dtype, _method = _name.split()
    HANDLERS[getattr(torch.Tensor, _method)] = functools.partial(cast, dtype=getattr(torch, _dtype))


@handles("to")
def _to(logits: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    if not isinstance(logits, Logits):
        return NotImplemented
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and torch.empty(0, device=device).device != logits.device:
        return NotImplemented
    return cast(logits, dtype or logits.dtype, copy)


@handles("cpu")
def _cpu(logits: Logits, *args: Any, **kwargs: Any) -> Any:
    return logits if logits.device.type == "cpu" else NotImplemented


def _add_gradients(one: torch.Tensor, other: torch.Tensor) -> Any:
    """The sum of two gradients, as autograd's engine forms it."""
    if one.shape != other.shape:
        return NotImplemented
    like = next(each for each in (one, other) if isinstance(each, Logits))
    both = (incoming(each, like.axis) for each in (one, other))
    made = (Logits.make(like.vocabulary, each, new_strides(like), like.device) for each in both)
    return elementwise(torch.add, tuple(made), {})


HANDLERS[torch.ops.aten.add.Tensor] = _add_gradients
