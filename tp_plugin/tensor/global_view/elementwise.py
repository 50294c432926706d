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
    gives_places = function.__name__ == "where" and len(args) + len(kwargs) == 1
    if gives_places or kwargs.get("out") is not None or (in_place and info_of(target) is None):
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
        info.peers.written(target)
        return result
    # `float` of what is in fp32 gives the very tensor, which looks whole
    if any(info_of(made) is None and tuple(made.shape) != info.local_shape for made in tensors_in(result)):
        return NotImplemented
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
        TPError: the function is not elementwise, writes into views, or those of one position lie differently.
    """
    lists = [value for value in (*args, *kwargs.values()) if _is_list(value)]
    if name == "_foreach_norm":
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        return [torch.linalg.vector_norm(tensor, order) for tensor in lists[0]]
    views = [one.info for one in tensors_in((args, kwargs)) if isinstance(one, GlobalView)]
    in_place = name.endswith("_")
    like = [next((one[at] for one in lists if info_of(one[at]) is not None), None) for at in range(len(lists[0]))]
    infos = [info_of(one) for one in like]
    fits = is_elementwise(name.removeprefix("_foreach_")) and not (in_place and views)
    try:
        if not fits:
            raise Misfit
        given = [[_mine(value, like) for value in args], {key: _mine(value, like) for key, value in kwargs.items()}]
    except Misfit:
        known = next(info for info in (*infos, *views) if info is not None)
        raise TPError(
            f"{known.peers.line()}: torch.{name} of these tensors is not supported with tp_size ({known.describe()}): "
            "it is not element by element, writes into rows or slices, or they lie differently on the ranks; call the "
            "function of single tensors"
        ) from None
    result = locally(function, *given)
    if not in_place:
        return [one if info is None else wrapped(one, info, None) for one, info in zip(result, infos, strict=True)]
    for info, near in zip(infos, like, strict=True):
        if info is not None:
            info.peers.written(near)
    return result


def _mine(value: Any, like: list[Any]) -> Any:
    """One argument: of a list, what meets this rank's elements of the shards at its positions."""
    if not _is_list(value):
        return plain_of(value) if isinstance(value, GlobalView) else value
    known = [info_of(near) for near in like]
    return [
        (plain_of(one) if isinstance(one, GlobalView) else one) if info is None else operand(one, info, near)
        for one, info, near in zip(value, known, like, strict=True)
    ]


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple) and bool(value) and isinstance(value[0], torch.Tensor)
