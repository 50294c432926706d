"""Full tensors of a sharded model that are assembled when they are used: saving holds one output file at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.shard.lazy_load import ABOUT
from tp_plugin.shard.mapped_file import inaccessible


class LazyFullTensor(torch.Tensor):
    """A full tensor in host memory that other ranks hold shards of. Looks full; computing with it reads it, each time.

    Those of tied names are one object; all others have storages of their own.
    """

    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> LazyFullTensor:
        nothing = inaccessible(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        lazy: LazyFullTensor = torch.Tensor._make_subclass(LazyFullTensor, nothing, False)
        lazy.read = read
        return lazy

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SAME and len(args) == 1 and not kwargs:
            return args[0]
        if function in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.data_ptr:  # the address must stay good
            (lazy,) = args
            kept = lazy.read()
            lazy.read = lambda: kept
        return function(*materialize(args), **materialize(kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self.read().clone())

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.read())


_SAME = {torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.cpu}
_ABOUT = {*ABOUT, torch.Tensor.untyped_storage}


def materialize(value: Any) -> Any:
    """``value`` with full tensors in place of lazy ones, in containers too; one that stands there twice, once."""
    return _materialize(value, {})


def _materialize(value: Any, read: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, LazyFullTensor):
        if id(value) not in read:
            read[id(value)] = value.read()
        return read[id(value)]
    if isinstance(value, dict):
        return {name: _materialize(item, read) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_materialize(item, read) for item in value)
    return value


def has_lazy(tensors: dict[str, Any]) -> bool:
    """Whether any value is lazy."""
    return any(isinstance(tensor, LazyFullTensor) for tensor in tensors.values())
