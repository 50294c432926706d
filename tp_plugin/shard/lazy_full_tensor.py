"""Whole tensors of a sharded model that are assembled when they are used: saving holds one output file at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tp_plugin.shard.lazy_load import ABOUT, inaccessible

_promising = False


@contextlib.contextmanager
def lazy_full_tensors() -> Iterator[None]:
    """Inside, ``state_dict`` of a sharded model gives promises of whole tensors."""
    global _promising
    before, _promising = _promising, True
    try:
        yield
    finally:
        _promising = before


def promising() -> bool:
    """Whether ``state_dict`` gives promises just now."""
    return _promising


class LazyFullTensor(torch.Tensor):
    """A whole tensor on the CPU that other ranks hold parts of. Looks whole; computing with it reads it, each time.

    Nobody else's memory: promises of tied names are one object, all others have storages of their own.
    """

    whole: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, whole: Callable[[], torch.Tensor]) -> LazyFullTensor:
        nothing = inaccessible(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        promise: LazyFullTensor = torch.Tensor._make_subclass(LazyFullTensor, nothing, False)
        promise.whole = whole
        return promise

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SAME and len(args) == 1 and not kwargs:
            return args[0]
        if function in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.data_ptr:  # the address must stay good
            (promise,) = args
            kept = promise.whole()
            promise.whole = lambda: kept
        return function(*materialize(args), **materialize(kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self.whole().clone())

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.whole())


_SAME = {torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.cpu}
_ABOUT = {*ABOUT, torch.Tensor.untyped_storage}


def materialize(value: Any) -> Any:
    """``value`` with full tensors in place of lazy ones, in containers too; one that stands there twice, once."""
    return _materialize(value, {})


def _materialize(value: Any, read: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, LazyFullTensor):
        if id(value) not in read:
            read[id(value)] = value.whole()
        return read[id(value)]
    if isinstance(value, dict):
        return {name: _materialize(item, read) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_materialize(item, read) for item in value)
    return value


def has_lazy(tensors: dict[str, Any]) -> bool:
    """Whether any value is a promise."""
    return any(isinstance(tensor, LazyFullTensor) for tensor in tensors.values())
