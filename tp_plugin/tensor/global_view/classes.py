"""The classes of tensors that look whole. The memory of each is this rank's, and C++ sees that only."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.tensor.global_view.dispatch import run
from tp_plugin.tensor.global_view.info import as_global, info_of, local_of, register
from tp_plugin.tensor.global_view.view import GlobalView
from tp_plugin.tensor.global_view.whole import whole_of
from tp_plugin.tensor.graphs import untraced


class GlobalTensor(torch.Tensor):
    """A gradient, ``.data``, or what was computed of one element by element."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied, info = local_of(self).detach().clone(), info_of(self)
            memo[id(self)] = copied if info is None else as_global(copied, info)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _pickled(self, protocol)


class GlobalParameter(nn.Parameter):
    """A parameter of a sharded model while the script has it; inside a step it is an ``nn.Parameter``."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = nn.Parameter(local_of(self).detach().clone(), self.requires_grad)
            memo[id(self)] = copied
            entry: Any = getattr(self, "tp_entry", None)
            if entry is not None:
                entry.copy_to(copied)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _pickled(self, protocol)


@functools.cache
def _dtensor() -> type:
    """Of FSDP2's parameters; made at the first of them, as a run without any does not import DTensor."""
    from torch.distributed.tensor import DTensor

    class GlobalDTensor(DTensor):
        """A parameter or gradient of which FSDP2 has left this rank some rows."""

        __slots__ = ()

        def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
            info = info_of(self)
            with torch.no_grad():
                return super().__repr__() if info is None else repr(whole_of(self, info))

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return GlobalTensor.__deepcopy__(self, memo)  # type: ignore[arg-type]

        def to_local(self, **kwargs: Any) -> Any:
            """Refused: it would be less than the script expects.

            Raises:
                TPError: always.
            """
            info = self.tp_global  # type: ignore[attr-defined]
            raise TPError(
                f"{info.peers.line()}: to_local() of {info.name!r}: {info.describe()}, and FSDP2 has split these, "
                "too; take full_tensor()"
            )

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(function, args, kwargs or {})

    return GlobalDTensor


def _pickled(tensor: Any, protocol: Any) -> Any:
    info = info_of(tensor)
    whole = local_of(tensor) if info is None else whole_of(tensor, info)
    whole = whole.detach()
    if isinstance(tensor, nn.Parameter):
        whole = nn.Parameter(whole, tensor.requires_grad)
    return whole.__reduce_ex__(protocol)


register("Tensor", lambda: GlobalTensor)
register("Parameter", lambda: GlobalParameter)
register("DTensor", _dtensor)
untraced(GlobalView)
GlobalView.__torch_function__ = GlobalTensor.__torch_function__  # type: ignore[method-assign]
