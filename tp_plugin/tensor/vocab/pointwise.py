"""Elementwise functions of deferred logits stay deferred: each rank computes them on its own columns, where needed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import Leaf, PerRow, Scalar, Whole
from tp_plugin.tensor.vocab.ops import HANDLERS, Handler, functions, handles
from tp_plugin.tensor.vocab.tensor import Logits, Operand, elementwise


def _pointwise(func: Handler) -> Handler:
    def handler(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return NotImplemented
        first = next(arg for arg in args if isinstance(arg, Logits))
        operands = [_operand(arg, first) for arg in args]
        if any(arg is NotImplemented for arg in operands):
            return NotImplemented
        return elementwise(func, tuple(operands), kwargs)

    return handler


def _operand(value: Any, logits: Logits) -> Any:
    """``value`` as an argument of :func:`elementwise`, or NotImplemented."""
    if isinstance(value, Logits):
        fits = value.shape == logits.shape and value.axis == logits.axis
        return value if fits else NotImplemented
    if not isinstance(value, torch.Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        return NotImplemented  # its gradient is a sum over all columns
    value, leaf = value.detach(), Leaf()
    if value.dim() == 0:
        return Operand(Scalar(leaf, value.dtype), {leaf: value}, 0)
    lead, size = logits.lead, logits.vocabulary.size
    shape = (1,) * (logits.dim() - value.dim()) + tuple(value.shape)
    fits = all(length in (1, whole) for length, whole in zip(shape, logits.shape, strict=False))
    transposed = logits.axis != logits.dim() - 1
    if value.dim() > logits.dim() or transposed or not fits or value.device != logits.device:
        return NotImplemented
    if shape[-1] == 1 != size:
        rows = value.reshape(shape).expand(*lead, 1).reshape(-1, 1)
        return Operand(PerRow(leaf, value.dtype), {leaf: rows}, logits.dim())
    flat = value.reshape(-1, size)
    if len(flat) == 1 or shape[:-1] == tuple(lead):
        return Operand(Whole(leaf, value.dtype), {leaf: flat}, logits.dim())
    row = Leaf()
    table = torch.arange(len(flat), device=value.device).view(shape[:-1]).expand(lead).reshape(-1)
    return Operand(Whole(leaf, value.dtype, row), {leaf: flat, row: table}, logits.dim())


for _func in functions(
    "add sub subtract mul multiply div divide true_divide rsub pow maximum minimum neg negative tanh sigmoid exp log "
    "log1p expm1 sqrt rsqrt square abs absolute clamp clip clamp_min clamp_max eq ne lt le gt ge isnan isinf isfinite "
    "logical_not nan_to_num masked_fill where relu sign reciprocal xlogy __add__ __radd__ __sub__ __rsub__ __mul__ "
    "__rmul__ __truediv__ __rtruediv__ __pow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__"
):
    HANDLERS[_func] = _pointwise(_func)


def cast(logits: Logits, dtype: torch.dtype, copy: bool = False) -> Logits:
    """``logits`` in ``dtype``; the same tensor if it has that."""
    if logits.dtype != dtype:
        return elementwise(torch.Tensor.to, (logits, dtype), {})
    copied: Any = logits.clone() if copy else logits
    result: Logits = copied
    return result


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


@handles("type_as")
def _type_as(logits: Any, other: torch.Tensor) -> Any:
    return cast(logits, other.dtype) if isinstance(logits, Logits) and other.device == logits.device else NotImplemented
