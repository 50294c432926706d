"""Everything else: the function of whole tensors. What it writes reaches the shards; views of a whole one write on."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.tensor.global_view.elementwise import is_in_place
from tp_plugin.tensor.global_view.info import GlobalInfo, info_of
from tp_plugin.tensor.global_view.operands import replaced, tensors_in, wholes_in
from tp_plugin.tensor.global_view.view import GlobalView, as_fsdp2_gives, make_view, refuse_recorded, write_through
from tp_plugin.tensor.global_view.whole import whole_of, write


def empty(tensor: Any, info: GlobalInfo) -> torch.Tensor:
    """A whole tensor that is to be overwritten."""
    return torch.empty(info.shape, dtype=tensor.dtype, device=tensor.device)


def call(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The result; ``name`` is the function's, empty for an attribute.

    Raises:
        TPError: ``out=`` is a tensor of which this rank holds a shard.
    """
    target = args[0] if args else next(iter(kwargs.values()), None)
    for out in tensors_in(kwargs.get("out")):
        seen = out.info if isinstance(out, GlobalView) else info_of(out)
        if seen is not None:
            raise TPError(
                f"{seen.peers.line()}: out= is not supported with tp_size ({seen.describe()}); copy_ the result into it"
            )
    if is_in_place(name) and isinstance(target, GlobalView):
        write_through(target, function, *wholes_in(args[1:]), **wholes_in(kwargs))
        return target
    info = info_of(target)
    if is_in_place(name) and info is not None:
        return _in_place(function, target, info, args, kwargs)
    wholes: dict[int, torch.Tensor] = {}
    result = function(*wholes_in(args, wholes), **wholes_in(kwargs, wholes))
    result = _views(result, function, args, kwargs, wholes)
    if any(is_split(value) for value in tensors_in((args, kwargs)) if info_of(value) is not None):
        return replaced(result, as_fsdp2_gives)
    return result


def _in_place(function: Any, target: Any, info: GlobalInfo, args: Any, kwargs: Any) -> Any:
    if getattr(function, "__module__", "") != "torch.nn.init":  # which writes under no_grad
        refuse_recorded(target, info)
    with torch.no_grad():
        whole = whole_of(target, info, to_write=True)
    wholes = {id(target): whole}
    result = function(*wholes_in(args, wholes), **wholes_in(kwargs, wholes))
    write(target, whole.detach(), info)
    return target if result is whole or result is None else result


def _views(result: Any, function: Any, args: Any, kwargs: Any, wholes: dict[int, torch.Tensor]) -> Any:
    """Of what ``function`` returned, that which lies in the memory of a whole tensor becomes a view that writes on."""
    sources: dict[int, tuple[Any, torch.Tensor, Any, GlobalInfo]] = {}
    for value in tensors_in((args, kwargs)):
        info = info_of(value)
        if isinstance(value, GlobalView):
            sources[_memory(value.whole)] = value, value.whole, value.base, value.info
        elif info is not None and id(value) in wholes:
            sources[_memory(wholes[id(value)])] = value, wholes[id(value)], value, info

    def view(part: Any, at: tuple[int, ...] = ()) -> Any:
        source = sources.get(_memory(part)) if type(part) is torch.Tensor else None
        if source is None:
            return part
        given, whole, base, info = source
        before = given.path if isinstance(given, GlobalView) else _same

        def path(fresh: Any) -> Any:
            given_anew = replaced((args, kwargs), lambda value: before(fresh) if value is given else value)
            found = function(*given_anew[0], **given_anew[1])
            return functools.reduce(lambda inner, index: inner[index], at, found)

        return make_view(part, whole, base, info, path)

    if isinstance(result, torch.Tensor):
        return view(result)
    if isinstance(result, tuple | list) and any(isinstance(part, torch.Tensor) for part in result):
        return type(result)([view(part, (index,)) for index, part in enumerate(result)])
    if type(result).__name__ == "ndarray":
        result.flags.writeable = False  # it is a copy: what is written there reaches nothing
    return result


def _same(whole: Any) -> Any:
    return whole


def _memory(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.untyped_storage()._cdata)
