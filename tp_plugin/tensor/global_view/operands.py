"""Arguments of a call: finding what looks whole among them, and what meets this rank's elements in the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from tp_plugin.mesh.dtensor_utils import is_split, split_like
from tp_plugin.tensor.global_view.info import GlobalInfo, as_global, info_of, local_of
from tp_plugin.tensor.global_view.view import GlobalView, plain_of
from tp_plugin.tensor.global_view.whole import whole_of


def tensors_in(value: Any) -> Iterator[Any]:
    """The tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def replaced(value: Any, by: Callable[[Any], Any]) -> Any:
    """Nested arguments with each tensor replaced."""
    if isinstance(value, torch.Tensor):
        return by(value)
    if isinstance(value, dict):
        return {key: replaced(item, by) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replaced(item, by) for item in value)
    return value


def locally(function: Any, args: Any, kwargs: Any) -> Any:
    """Call ``function`` with what this rank holds."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def wholes_in(value: Any, wholes: dict[int, torch.Tensor] | None = None) -> Any:
    """Nested arguments with whole tensors in place of what looks whole; one that stands there twice is gathered once.

    Args:
        wholes: by the ids of the tensors; what is gathered is added.
    """
    found = {} if wholes is None else wholes

    def whole(tensor: Any) -> Any:
        if isinstance(tensor, GlobalView):
            return plain_of(tensor)
        info = info_of(tensor)
        if info is None:
            return local_of(tensor)
        if id(tensor) not in found:
            found[id(tensor)] = whole_of(tensor, info)
        return found[id(tensor)]

    return replaced(value, whole)


class Misfit(Exception):
    """An operand of which this rank's part cannot be told."""


def operand(value: Any, info: GlobalInfo, like: Any) -> Any:
    """What of ``value`` meets this rank's elements of a tensor of ``info``; ``like`` is such a tensor.

    Raises:
        Misfit: it lies otherwise on the ranks, has another shape, or is to get a gradient, which is of all elements.
    """
    other = info_of(value)
    if other is not None:
        if (other.layout is not info.layout and other.layout != info.layout) or is_split(value) != is_split(like):
            raise Misfit
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise Misfit  # each rank would give it the gradient of its own elements only
    return _part(plain_of(value) if isinstance(value, GlobalView) else local_of(value), info, like)


def _part(value: Any, info: GlobalInfo, like: Any) -> Any:
    shape, dim = info.shape, info.layout.dim
    if value.dim() == 0:
        return value
    missing = len(shape) - value.dim()
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(value.shape, shape[missing:], strict=True)):
        raise Misfit
    at = -1 if dim is None else dim - missing
    mine = value
    if dim is not None and at >= 0 and (value.shape[at] != 1 or shape[dim] == 1):
        pieces = [value.narrow(at, a, b - a) for a, b in info.layout.parts[info.rank] or ((0, 0),)]
        padding = info.local_shape[dim] - sum(piece.shape[at] for piece in pieces)
        if padding:
            pieces.append(value.new_ones((*value.shape[:at], padding, *value.shape[at + 1 :])))
        mine = pieces[0] if len(pieces) == 1 else torch.cat(pieces, at)
    return _spread(mine, like) if is_split(like) and not is_split(mine) else mine


def _spread(mine: torch.Tensor, like: Any) -> Any:
    """What meets the rows that FSDP2 has left this rank."""
    from torch.distributed.tensor import DTensor, Replicate

    if mine.dim() == like.dim() and mine.shape[0] == like.shape[0]:
        return split_like(mine, like)
    return DTensor.from_local(mine, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def made(info: GlobalInfo, applied: Callable[[Any], Any] | None) -> GlobalInfo:
    """The info of what was made of a tensor, by ``applied`` in addition; None: others had a part in it."""
    if applied is None or info.applied is None:
        return replace(info, applied=None)
    return replace(info, applied=(*info.applied, applied), made=info.made or info.peers.stamp())


def wrapped(value: Any, info: GlobalInfo, applied: Callable[[Any], Any] | None) -> Any:
    """A result of this rank's elements, as one that looks whole; a number, and what does so already, as it is."""
    if info_of(value) is not None or tuple(value.shape) != info.local_shape:
        return value
    return as_global(value, made(info, applied))
