"""Attributes, sizes and hooks of tensors that look whole; ``.data`` and ``.grad`` take and give what looks whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.tensor.global_view import on_whole
from tp_plugin.tensor.global_view.info import GlobalInfo, as_global, info_of, local_of
from tp_plugin.tensor.global_view.operands import locally, wholes_in
from tp_plugin.tensor.global_view.view import GlobalView, plain_of
from tp_plugin.tensor.global_view.whole import shard_of, whole_of

_OTHER_VIEWS = ("T", "mT", "H", "mH", "real", "imag")


def access(function: Any, how: str, name: str, args: tuple[Any, ...]) -> Any:
    """Get, set or delete (``how``: ``__get__``, …) the attribute ``name`` of ``args[0]``."""
    tensor = args[0]
    info = info_of(tensor)
    views = (*_OTHER_VIEWS, "data") if isinstance(tensor, GlobalView) else _OTHER_VIEWS if info is not None else ()
    if how == "__get__":
        if name in views:
            return on_whole.call(function, "", args, {})
        return locally(function, args, {}) if info is None else _get(function, name, tensor, info)
    if how == "__set__" and name in ("data", "grad"):
        if info is not None:
            _assign(function, name, tensor, args[1], info)
        else:  # of what looks whole, the whole
            given = wholes_in(args[1])
            locally(function, (tensor, given.detach() if isinstance(given, torch.Tensor) else given), {})
        return None
    return locally(function, args, {})


def _get(function: Any, name: str, tensor: Any, info: GlobalInfo) -> Any:
    if name == "shape":
        return torch.Size(info.shape)
    if name == "nbytes":
        return torch.Size(info.shape).numel() * tensor.element_size()
    if name in ("__array_interface__", "__cuda_array_interface__"):
        return getattr(info.peers.keep(tensor, lambda: whole_of(tensor, info)), name)
    found = locally(function, (tensor,), {})
    if name == "data":
        return as_global(found, info)
    return gradient(found, info) if name == "grad" else found


def gradient(grad: Any, info: GlobalInfo) -> Any:
    """A tensor beside ``grad``, with its memory, that looks whole: the gradient itself is the optimizer's."""
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
    value = plain_of(value) if isinstance(value, GlobalView) else value
    if isinstance(value, torch.Tensor):
        if tuple(value.shape) != tuple(info.shape):
            raise TPError(
                f"{info.peers.line()}: {info.name}.{name} was given a tensor of shape {tuple(value.shape)}, but has "
                f"{tuple(info.shape)} ({info.describe()})"
            )
        value = to_local(value, info, local_of(tensor))
    if name == "data" and is_split(tensor):  # whose memory is FSDP2's
        with torch.no_grad():
            locally(torch.Tensor.copy_, (tensor, value), {})
        return info.peers.written(tensor)
    grad = getattr(tensor, "tp_alias_of", None)
    for one in (tensor,) if grad is None or name == "grad" else (grad, tensor):
        locally(function, (one, value), {})
    info.peers.written(tensor)


def to_local(value: Any, info: GlobalInfo, like: Any) -> Any:
    """What this rank holds of a tensor of the whole's shape: the same memory, if it lies as ``info`` says."""
    given = info_of(value)
    if given is not None and given.layout == info.layout:
        return getattr(value, "tp_alias_of", None) if hasattr(value, "tp_alias_of") else local_of(value)
    whole = local_of(value) if given is None else whole_of(value, given)
    return shard_of(whole.detach(), info, like)


def known(tensor: Any) -> GlobalInfo:
    """Its info, which it has."""
    info = info_of(tensor)
    assert info is not None
    return info


def _size(tensor: Any, dim: int | None = None) -> Any:
    whole = torch.Size(known(tensor).shape)
    return whole if dim is None else whole[dim]


def _stride(tensor: Any, dim: int | None = None) -> Any:
    strides, step = [], 1
    for length in reversed(known(tensor).shape):
        strides.append(step)
        step *= max(length, 1)
    found = tuple(reversed(strides))
    return found if dim is None else found[dim]


def _numel(tensor: Any) -> int:
    return torch.Size(known(tensor).shape).numel()


def _data_ptr(tensor: Any) -> int:
    """Somebody reads memory by its address (safetensors): all of it must be there, while the script runs."""
    info = known(tensor)
    with torch.no_grad():
        return info.peers.keep(tensor, lambda: whole_of(tensor, info)).data_ptr()


def _repr(tensor: Any, *, tensor_contents: Any = None) -> str:
    with torch.no_grad():
        whole = whole_of(tensor, known(tensor))
    return repr(whole.requires_grad_(tensor.requires_grad) if tensor.is_leaf else whole)


def gradient_hook(hook: Callable[[Any], Any], info: GlobalInfo) -> Callable[[Any], Any]:
    """``hook``, which gets a whole gradient, and may return one, as a hook of what this rank holds."""

    def run(grad: Any) -> Any:
        with info.peers.script():
            found = hook(grad if info.is_whole and not is_split(grad) else gradient(grad, info))
            found = plain_of(found) if isinstance(found, GlobalView) else found
            return None if found is None else to_local(found, info, grad)

    run.gets_whole = True  # type: ignore[attr-defined]
    return run


def accumulated_hook(hook: Callable[[Any], Any], info: GlobalInfo) -> Callable[[Any], Any]:
    """``hook``, which finds a parameter and its gradient whole, as one that is called in a step."""

    def run(parameter: Any) -> Any:
        with info.peers.script():
            return hook(parameter)

    run.gets_whole = True  # type: ignore[attr-defined]
    return run


def _register_hook(tensor: Any, hook: Callable[[Any], Any]) -> Any:
    return locally(torch.Tensor.register_hook, (tensor, gradient_hook(hook, known(tensor))), {})


def _register_post_accumulate_grad_hook(tensor: Any, hook: Callable[[Any], Any]) -> Any:
    hook = accumulated_hook(hook, known(tensor))
    return locally(torch.Tensor.register_post_accumulate_grad_hook, (tensor, hook), {})


ABOUT: dict[str, Callable[..., Any]] = {
    "size": _size,
    "stride": _stride,
    "numel": _numel,
    "nelement": _numel,
    "data_ptr": _data_ptr,
    "__len__": lambda tensor: known(tensor).shape[0],
    "__repr__": _repr,
    "is_same_size": lambda tensor, other: tuple(tensor.shape) == tuple(other.shape),
    "register_hook": _register_hook,
    "register_post_accumulate_grad_hook": _register_post_accumulate_grad_hook,
}
"""Methods that are asked of the whole, without looking at its elements (but the last resorts)."""
