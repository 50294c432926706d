"""Element-wise functions of deferred logits: casts, scaling, soft-capping, biases, and the terms of divergences.

Each rank computes them on its own columns, where and when these are needed. An operand may be a number, another
:class:`Logits` of the same shape, or a tensor without a gradient that every rank has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import Apply, Expr, Full, PerRow
from tp_plugin.tensor.vocab.logits import Deferred, Logits, incoming, new_strides, tracks
from tp_plugin.tensor.vocab.registry import HANDLERS, Handler, functions, handles


def elementwise(function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``function`` of at least one Logits, and of tensors, numbers and dtypes; NotImplemented if an operand is unfit."""
    first = next(arg for arg in args if isinstance(arg, Logits))
    operands = [_operand(arg, first) for arg in args]
    if any(operand is NotImplemented for operand in operands):
        return NotImplemented
    metas = [
        torch.empty((1,) * first.dim() if isinstance(operand, Expr) else (), dtype=operand.dtype, device="meta")
        if isinstance(operand, Expr | torch.Tensor)
        else operand
        for operand in operands
    ]
    expr = Apply(function, tuple(operands), function(*metas, **kwargs).dtype, kwargs)
    parents = [arg for arg in args if isinstance(arg, Logits)]
    held = tuple(one for parent in parents for one in parent.held)
    made = Logits.make(first.vocabulary, expr, new_strides(first), first.device, held)
    if not any(tracks(parent) for parent in parents) or not expr.dtype.is_floating_point:
        return made
    positions = [position for position, arg in enumerate(args) if isinstance(arg, Logits)]
    return Deferred.apply((made,), expr, lambda expr, grad, at: expr.gradient(positions[at], grad), *parents)


def _operand(value: Any, logits: Logits) -> Any:
    """``value`` as an argument of :class:`Apply`, or NotImplemented."""
    if isinstance(value, Logits):
        fits = value.shape == logits.shape and value.axis == logits.axis
        return value.expr if fits else NotImplemented
    if not isinstance(value, torch.Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        return NotImplemented  # its gradient is a sum over all columns
    value = value.detach()
    if value.dim() == 0:
        return value
    lead, size = logits.lead, logits.vocabulary.size
    shape = (1,) * (logits.dim() - value.dim()) + tuple(value.shape)
    fits = all(length in (1, full) for length, full in zip(shape, logits.shape, strict=False))
    transposed = logits.axis != logits.dim() - 1
    if value.dim() > logits.dim() or transposed or not fits or value.device != logits.device:
        return NotImplemented
    if shape[-1] == 1 != size:
        return PerRow(value.reshape(shape).expand(*lead, 1).reshape(-1, 1))
    flat = value.reshape(-1, size)
    if len(flat) == 1 or shape[:-1] == tuple(lead):
        return Full(flat)
    return Full(flat, torch.arange(len(flat), device=value.device).view(shape[:-1]).expand(lead).reshape(-1))


def _handler(func: Handler) -> Handler:
    def handler(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return NotImplemented
        return elementwise(func, args, kwargs)

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


@handles("detach")
def _alias(logits: Logits) -> Logits:
    """The same values outside of the graph."""
    return logits.alias()


HANDLERS[torch.Tensor.data.__get__] = _alias  # type: ignore[attr-defined]
HANDLERS[torch.ops.aten.detach.default] = HANDLERS[torch.ops.aten.alias.default] = _alias


def _add_gradients(one: torch.Tensor, other: torch.Tensor) -> Any:
    """The sum of two gradients, as autograd's engine forms it."""
    if one.shape != other.shape:
        return NotImplemented
    like = next(each for each in (one, other) if isinstance(each, Logits))
    both = tuple(
        Logits.make(like.vocabulary, incoming(each, like.axis), new_strides(like), like.device) for each in (one, other)
    )
    return elementwise(torch.add, both, {})


HANDLERS[torch.ops.aten.add.Tensor] = _add_gradients
