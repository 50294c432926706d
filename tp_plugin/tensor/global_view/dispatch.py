"""What each of torch's functions does with tensors that look whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split, split_like
from tp_plugin.tensor.global_view import tables
from tp_plugin.tensor.global_view.info import GlobalInfo, as_global, info_of, local_of
from tp_plugin.tensor.global_view.view import GlobalView, make_view, plain_of, refuse_recorded, write_through
from tp_plugin.tensor.global_view.whole import read_alone, reduce, shard_of, whole_of, write


class Calls:
    """How many functions were dispatched in this process: none inside a step."""

    count = 0


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``function``, of whose arguments some look whole, or are views of such."""
    Calls.count += 1
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(function, name, getattr(function.__self__, "__name__", ""), args)
    infos = [info for value in _flat((args, kwargs)) if (info := info_of(value)) is not None]
    if name in tables.LOCAL or not (infos or any(isinstance(value, GlobalView) for value in _flat((args, kwargs)))):
        return _locally(function, args, kwargs)
    if name == "grad" and getattr(function, "__module__", "") == "torch.autograd":
        return _gradients(function, args, kwargs)
    if infos and (about := _ABOUT.get(name)) is not None and info_of(args[0]) is not None:
        return about(*args, **kwargs)
    if name.startswith("_foreach_"):
        return _foreach(function, name, args, kwargs)
    if infos and _is_elementwise(name):
        done = _elementwise(function, args, kwargs, infos[0])
        if done is not NotImplemented:
            return done
    if name in tables.REDUCTIONS and args and info_of(args[0]) is not None:
        done = _reduce(function, name, args, kwargs)
        if done is not NotImplemented:
            return done
    if name in tables.RANDOM and args and (info := info_of(args[0])) is not None:
        whole = function(_empty(args[0], info), *args[1:], **kwargs)
        return as_global(shard_of(whole, info, local_of(args[0])), _made(info, None))
    if name in tables.SHAPE_OF_OTHER and len(args) == 2 and info_of(args[0]) is None:
        return getattr(args[0], tables.SHAPE_OF_OTHER[name])(args[1].shape)
    return _on_whole(function, name, args, kwargs)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)


def _replaced(value: Any, by: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return by(value)
    if isinstance(value, dict):
        return {key: _replaced(item, by) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, by) for item in value)
    return value


def _locally(function: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _made(info: GlobalInfo, applied: Any) -> GlobalInfo:
    """The info of what was made of a tensor, by ``applied`` in addition; None: other tensors had a part in it."""
    if applied is None or info.applied is None:
        return replace(info, applied=None)
    return replace(info, applied=(*info.applied, applied), made=info.made or info.peers.stamp())


# what looks at no element


def _attribute(function: Any, access: str, name: str, args: tuple[Any, ...]) -> Any:
    tensor = args[0]
    info = info_of(tensor)
    if isinstance(tensor, GlobalView):
        if access == "__get__" and name in ("T", "mT", "H", "mH", "real", "imag", "data"):
            return _on_whole(function, "", args, {})
        return _locally(function, args, {})
    if info is None:
        given = tuple(_whole(value) for value in args[1:])  # of what looks whole, the whole
        return _locally(function, (tensor, *(v.detach() if isinstance(v, torch.Tensor) else v for v in given)), {})
    if name in ("__array_interface__", "__cuda_array_interface__"):
        return getattr(info.peers.keep(tensor, lambda: whole_of(tensor, info)), name)
    if access == "__set__" and name in ("data", "grad"):
        return _assign(function, name, tensor, args[1], info)
    if access != "__get__":
        return _locally(function, args, {})
    if name == "shape":
        return torch.Size(info.shape)
    if name == "nbytes":
        return torch.Size(info.shape).numel() * tensor.element_size()
    if name == "data":
        return as_global(_locally(function, args, {}), info)
    if name == "grad":
        return _gradient(_locally(function, args, {}), info)
    if name in ("T", "mT", "H", "mH", "real", "imag"):
        return _on_whole(function, "", args, {})
    return _locally(function, args, {})


def _gradient(grad: Any, info: GlobalInfo) -> Any:
    """A tensor beside the gradient, with its memory: the gradient itself stays what the optimizer expects."""
    if grad is None:
        return None
    alias = grad.view_as(grad) if grad.requires_grad or is_split(grad) else grad.as_subclass(torch.Tensor)
    alias = as_global(alias, info.of_gradient())
    alias.tp_alias_of = grad
    return alias


def _assign(function: Any, name: str, tensor: Any, value: Any, info: GlobalInfo) -> None:
    """``p.data = …``, ``p.grad = …``: of what is whole, this rank's part.

    Raises:
        TPError: another shape than the whole's.
    """
    if isinstance(value, GlobalView):
        value = plain_of(value)
    given = info_of(value)
    if isinstance(value, torch.Tensor):
        if tuple(value.shape) != tuple(info.shape):
            raise TPError(
                f"{info.peers.line()}: {info.name}.{name} was given a tensor of shape {tuple(value.shape)}, but has "
                f"{tuple(info.shape)} ({info.describe()})"
            )
        if given is not None and given.layout == info.layout:
            value = (
                getattr(value, "tp_alias_of", None)
                if name == "grad" and hasattr(value, "tp_alias_of")
                else local_of(value)
            )
        else:
            whole = whole_of(value, given) if given is not None else value
            value = shard_of(whole.detach(), info, local_of(tensor))
    _locally(function, (getattr(tensor, "tp_alias_of", tensor) if name == "data" else tensor, value), {})
    if name == "data" and hasattr(tensor, "tp_alias_of"):
        _locally(function, (tensor, value), {})
    info.peers.written()


def _size(tensor: Any, dim: int | None = None) -> Any:
    whole = torch.Size(_known(tensor).shape)
    return whole if dim is None else whole[dim]


def _stride(tensor: Any, dim: int | None = None) -> Any:
    strides, step = [], 1
    for length in reversed(_known(tensor).shape):
        strides.append(step)
        step *= max(length, 1)
    found = tuple(reversed(strides))
    return found if dim is None else found[dim]


def _known(tensor: Any) -> GlobalInfo:
    info = info_of(tensor)
    assert info is not None
    return info


def _register_hook(tensor: Any, hook: Callable[[Any], Any]) -> Any:
    """A hook of the script's gets a whole gradient, and may return one."""
    info = _known(tensor)

    def whole(grad: Any) -> Any:
        with info.peers.script():
            found = hook(_gradient(grad, info))
            return None if found is None else _local_gradient(found, grad, info)

    return _locally(torch.Tensor.register_hook, (tensor, whole), {})


def _register_post_accumulate_grad_hook(tensor: Any, hook: Callable[[Any], Any]) -> Any:
    """A hook of the script's finds the parameter and its gradient whole."""
    info = _known(tensor)

    def whole(parameter: Any) -> Any:
        with info.peers.script():
            return hook(parameter)

    return _locally(torch.Tensor.register_post_accumulate_grad_hook, (tensor, whole), {})


def _local_gradient(found: Any, grad: Any, info: GlobalInfo) -> Any:
    if isinstance(found, GlobalView):
        found = plain_of(found)
    given = info_of(found)
    if given is not None and given.layout == info.layout:
        return local_of(found)
    return shard_of(found if given is None else whole_of(found, given), info, grad)


def _data_ptr(tensor: Any) -> int:
    """Somebody reads memory by its address (safetensors): it must be there, all of it, for as long as the script runs."""
    with torch.no_grad():
        return _known(tensor).peers.keep(tensor, lambda: whole_of(tensor, _known(tensor))).data_ptr()


def _repr(tensor: Any, *, tensor_contents: Any = None) -> str:
    with torch.no_grad():
        whole = whole_of(tensor, _known(tensor))
    return repr(whole.requires_grad_(tensor.requires_grad) if tensor.is_leaf else whole)


_ABOUT: dict[str, Callable[..., Any]] = {
    "size": _size,
    "stride": _stride,
    "data_ptr": _data_ptr,
    "numel": lambda input: torch.Size(_known(input).shape).numel(),
    "nelement": lambda input: torch.Size(_known(input).shape).numel(),
    "__len__": lambda tensor: _known(tensor).shape[0],
    "__repr__": _repr,
    "register_hook": _register_hook,
    "register_post_accumulate_grad_hook": _register_post_accumulate_grad_hook,
    "is_same_size": lambda tensor, other: tuple(tensor.shape) == tuple(other.shape),
}


# element by element


def _is_elementwise(name: str) -> bool:
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return plain in tables.ELEMENTWISE or name in tables.IN_PLACE_OPERATORS


def _is_in_place(name: str) -> bool:
    return (
        name in ("__setitem__", *tables.IN_PLACE_OPERATORS)
        or (name.endswith("_") and not name.endswith("__"))
        or (
            name.startswith("__i")
            and name.endswith("__")
            and name not in ("__invert__", "__index__", "__int__", "__iter__")
        )
    )


class _Misfit(Exception):
    """An operand of which this rank's part cannot be told."""


def _elementwise(function: Any, args: Any, kwargs: Any, info: GlobalInfo) -> Any:
    in_place = _is_in_place(function.__name__)
    target = args[0] if args else None
    if kwargs.get("out") is not None or (in_place and info_of(target) is None):
        return NotImplemented
    if in_place:
        info = _known(target)
    try:
        mine = _replaced(args, lambda value: _operand(value, info, target if in_place else None))
        named = _replaced(kwargs, lambda value: _operand(value, info, None))
    except _Misfit:
        return NotImplemented
    result = _locally(function, mine, named)
    if in_place:
        info.peers.written()
        return result
    others = sum(1 for _ in _flat((args, kwargs))) > 1
    applied = None if others else _applied(function, args, kwargs)
    return _replaced(result, lambda value: _wrapped(value, info, applied))


def _wrapped(value: Any, info: GlobalInfo, applied: Any) -> Any:
    if info_of(value) is not None or tuple(value.shape) != info.local_shape:
        return value  # itself (``contiguous``), or a number
    return as_global(value, _made(info, applied))


def _applied(function: Any, args: Any, kwargs: Any) -> Callable[[Any], Any]:
    """``function`` of another tensor in place of the one among the arguments."""

    def call(other: Any) -> Any:
        return function(*_replaced(args, lambda _: other), **_replaced(kwargs, lambda _: other))

    return call


def _operand(value: Any, info: GlobalInfo, target: Any) -> Any:
    if value is target:
        return value
    other = info_of(value)
    if other is not None:
        if other.layout is not info.layout and other.layout != info.layout:
            raise _Misfit
        return value
    if isinstance(value, GlobalView):
        value = plain_of(value)
    return _part(value, info)


def _part(value: torch.Tensor, info: GlobalInfo) -> Any:
    """What meets this rank's elements of an ordinary operand that broadcasts with the whole tensor."""
    shape, dim = info.shape, info.layout.dim
    if value.dim() == 0 or dim is None:
        return value
    missing = len(shape) - value.dim()
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(value.shape, shape[missing:], strict=True)):
        raise _Misfit
    at = dim - missing
    if at < 0 or value.shape[at] == 1 != shape[dim]:
        return value
    pieces = [value.narrow(at, a, b - a) for a, b in info.layout.parts[info.rank]]
    padding = info.local_shape[dim] - sum(piece.shape[at] for piece in pieces)
    if padding:
        pieces.append(value.new_ones((*value.shape[:at], padding, *value.shape[at + 1 :])))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, at)


def _foreach(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Lists of tensors, position by position: of some this rank has shards, others are ordinary."""
    lists = [value for value in (*args, *kwargs.values()) if type(value) in (list, tuple) and _has_tensors(value)]
    infos = [next((i for one in lists if (i := info_of(one[at])) is not None), None) for at in range(len(lists[0]))]
    if name == "_foreach_norm":
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        return [torch.linalg.vector_norm(tensor, order) for tensor in lists[0]]
    if not _is_elementwise(name.removeprefix("_foreach_")):
        raise TPError(f"torch.{name} of tensors of which this rank holds shards is not supported with tp_size")
    in_place = name.endswith("_")

    def mine(value: Any) -> Any:
        if not (type(value) in (list, tuple) and _has_tensors(value)):
            return plain_of(value) if isinstance(value, GlobalView) else value
        return [one if info is None else _operand(one, info, None) for one, info in zip(value, infos, strict=True)]

    try:
        result = _locally(
            function, [mine(value) for value in args], {key: mine(value) for key, value in kwargs.items()}
        )
    except _Misfit:
        raise TPError(
            f"torch.{name} was given tensors that lie differently on the ranks ({_first(infos).describe()}); call the "
            "function of single tensors for them"
        ) from None
    if in_place:
        _first(infos).peers.written()
        return result
    return [one if info is None else _wrapped(one, info, None) for one, info in zip(result, infos, strict=True)]


def _has_tensors(value: Any) -> bool:
    return bool(value) and isinstance(value[0], torch.Tensor)


def _first(infos: list[GlobalInfo | None]) -> GlobalInfo:
    return next(info for info in infos if info is not None)


# numbers of all elements


def _reduce(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    tensor, rest = args[0], args[1:]
    info, asked = (
        _known(tensor),
        {key: value for key, value in kwargs.items() if value is not None and value is not False},
    )
    order: Any = 2.0
    if name in ("norm", "linalg_vector_norm"):
        order = rest[0] if rest else asked.get("p", asked.get("ord", 2.0))
        order = 2.0 if order in (None, "fro") else order
        plain = len(rest) <= 1 and set(asked) <= {"p", "ord"} and not isinstance(order, str)
    else:
        plain = not rest and set(asked) <= ({"dtype"} if name in ("sum", "mean") else set())
    recorded = local_of(tensor).requires_grad and torch.is_grad_enabled()
    extreme = name in ("max", "min", "amax", "amin") or order in (float("inf"), float("-inf"))
    if not plain or is_split(tensor) or (recorded and extreme):
        return NotImplemented
    if not info.peers.meet(f"{name} of {info.name}"):
        return function(read_alone(tensor, info), *rest, **kwargs)
    return reduce(name, tensor, info, float(order), asked.get("dtype"))


# everything else


def _empty(tensor: Any, info: GlobalInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=tensor.dtype, device=tensor.device)


def _gradients(function: Any, args: Any, kwargs: Any) -> Any:
    """``torch.autograd.grad``: gradients of what looks whole look whole."""
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    found = _locally(function, args, kwargs)
    return tuple(
        grad if grad is None or (info := info_of(given)) is None else as_global(grad, info.of_gradient())
        for grad, given in zip(found, inputs, strict=True)
    )


def _on_whole(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Call ``function`` of whole tensors. What it writes in place into one reaches the shards; views of one write on."""
    target = args[0] if args else next(iter(kwargs.values()), None)
    of_init = getattr(function, "__module__", "") == "torch.nn.init"
    out = kwargs.get("out")
    if info_of(out) is not None or isinstance(out, GlobalView):
        raise TPError(f"out={_describe(out)} is not supported with tp_size; copy_ the result into it")
    in_place = _is_in_place(name) and (info_of(target) is not None or isinstance(target, GlobalView))
    if in_place and isinstance(target, GlobalView):
        write_through(target, lambda plain, *a, **k: function(plain, *a, **k), *_whole(args[1:]), **_whole(kwargs))
        return target
    if in_place:
        info = _known(target)
        if not of_init:
            refuse_recorded(target, info)
        with torch.no_grad():
            whole = _empty(target, info) if name in tables.RANDOM_FILLS else whole_of(target, info)
        wholes = {id(target): whole}
        result = function(*_whole(args, wholes), **_whole(kwargs, wholes))
        write(target, whole.detach(), info)
        return target if result is whole or result is None else result
    wholes = {}
    result = function(*_whole(args, wholes), **_whole(kwargs, wholes))
    return _views(result, function, args, kwargs, wholes)


def _describe(value: Any) -> str:
    info = info_of(value) or getattr(value, "info", None)
    return info.name if info is not None else "a view"


def _whole(value: Any, wholes: dict[int, torch.Tensor] | None = None) -> Any:
    """``value`` with whole tensors in place of what looks whole; one that stands there twice is gathered once."""
    wholes = {} if wholes is None else wholes

    def whole(tensor: Any) -> Any:
        if isinstance(tensor, GlobalView):
            return plain_of(tensor)
        info = info_of(tensor)
        if info is None:
            return local_of(tensor)
        if id(tensor) not in wholes:
            wholes[id(tensor)] = whole_of(tensor, info)
        return wholes[id(tensor)]

    return _replaced(value, whole)


def _views(result: Any, function: Any, args: Any, kwargs: Any, wholes: dict[int, torch.Tensor]) -> Any:
    """Of what ``function`` returned, that which lies in the memory of a whole tensor becomes a view that writes on."""
    sources = {}
    for value in _flat((args, kwargs)):
        if isinstance(value, GlobalView):
            sources[_memory(value.whole)] = value, value.whole, value.base, value.info
        elif id(value) in wholes:
            whole = wholes[id(value)]
            sources[_memory(whole)] = value, whole, value, _known(value)

    def view(part: Any, at: tuple[int, ...] = ()) -> Any:
        source = sources.get(_memory(part)) if type(part) is torch.Tensor else None
        if source is None:
            return part
        given, whole, base, info = source
        before = given.path if isinstance(given, GlobalView) else _same

        def path(fresh: Any) -> Any:
            found = function(
                *_replaced(args, lambda value: before(fresh) if value is given else value),
                **_replaced(kwargs, lambda value: before(fresh) if value is given else value),
            )
            return functools.reduce(lambda inner, index: inner[index], at, found)

        return make_view(part, whole, base, info, path)

    if isinstance(result, tuple | list) and any(isinstance(part, torch.Tensor) for part in result):
        parts = [view(part, (index,)) for index, part in enumerate(result)]
        return type(result)(parts) if type(result) in (tuple, list) else type(result)(parts)
    if isinstance(result, torch.Tensor):
        return view(result)
    if type(result).__name__ == "ndarray":
        result.flags.writeable = False  # it is a copy: what is written there reaches nothing
    return result


def _same(whole: Any) -> Any:
    return whole


def _memory(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()._cdata
