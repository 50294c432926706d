"""Functions that compute each element from those at its place: this rank computes its own, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.tensor.global_view import tables
from tp_plugin.tensor.global_view.info import GlobalInfo, info_of
from tp_plugin.tensor.global_view.operands import Misfit, locally, operand, replaced, tensors_in, wrapped
from tp_plugin.tensor.global_view.view import GlobalView, plain_of


def is_elementwise(name: str) -> bool:
    """Whether the function of that name is one."""
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return plain in tables.ELEMENTWISE or name in tables.IN_PLACE_OPERATORS


def is_in_place(name: str) -> bool:
    """Whether the function of that name writes into its first argument."""
    return (
        name == "__setitem__" or name in tables.IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    )


def call(function: Any, args: Any, kwargs: Any) -> Any:
    """The result, or NotImplemented where operands do not meet element by element."""
    in_place = is_in_place(function.__name__)
    target = args[0] if args else None
    if kwargs.get("out") is not None or (in_place and info_of(target) is None):
        return NotImplemented
    like = target if in_place else next(one for one in tensors_in((args, kwargs)) if info_of(one) is not None)
    info = _known(like)
    try:
        mine = replaced(args, lambda value: operand(value, info, like))
        named = replaced(kwargs, lambda value: operand(value, info, like))
    except Misfit:
        return NotImplemented
    result = locally(function, mine, named)
    if in_place:
        info.peers.written()
        return result
    alone = sum(1 for _ in tensors_in((args, kwargs))) == 1
    applied = _applied(function, args, kwargs) if alone else None
    return replaced(result, lambda value: wrapped(value, info, applied))


def _known(tensor: Any) -> GlobalInfo:
    info = info_of(tensor)
    assert info is not None
    return info


def _applied(function: Any, args: Any, kwargs: Any) -> Callable[[Any], Any]:
    """``function`` of another tensor in place of the one among the arguments."""
    args, kwargs = replaced((args, kwargs), lambda _: _Here)  # which is not kept alive

    def put(value: Any, other: Any) -> Any:
        if value is _Here:
            return other
        if isinstance(value, dict):
            return {key: put(item, other) for key, item in value.items()}
        return type(value)(put(item, other) for item in value) if type(value) in (list, tuple) else value

    return lambda other: function(*put(args, other), **put(kwargs, other))


class _Here:
    """Stands for the tensor."""


def call_foreach(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Lists of tensors, position by position: of some this rank has shards, others are ordinary.

    Raises:
        TPError: the function is not elementwise, or those of one position lie differently on the ranks.
    """
    lists = [value for value in (*args, *kwargs.values()) if _is_list(value)]
    like = [next((one[at] for one in lists if info_of(one[at]) is not None), None) for at in range(len(lists[0]))]
    infos = [info_of(one) for one in like]
    if name == "_foreach_norm":
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        return [torch.linalg.vector_norm(tensor, order) for tensor in lists[0]]
    if not is_elementwise(name.removeprefix("_foreach_")):
        raise TPError(f"torch.{name} of tensors of which this rank holds shards is not supported with tp_size")

    def mine(value: Any) -> Any:
        if not _is_list(value):
            return plain_of(value) if isinstance(value, GlobalView) else value
        return [
            one if info is None else operand(one, info, near)
            for one, info, near in zip(value, infos, like, strict=True)
        ]

    first = next((info for info in infos if info is not None), None)
    try:
        given = [mine(value) for value in args], {key: mine(value) for key, value in kwargs.items()}
    except Misfit:
        assert first is not None
        raise TPError(
            f"{first.peers.line()}: torch.{name} was given tensors that lie differently on the ranks "
            f"({first.describe()}); call the function of single tensors for them"
        ) from None
    result = locally(function, *given)
    if name.endswith("_"):
        if first is not None:
            first.peers.written()
        return result
    return [one if info is None else wrapped(one, info, None) for one, info in zip(result, infos, strict=True)]


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple) and bool(value) and isinstance(value[0], torch.Tensor)
