"""Weights in codes while the script has them: they say of themselves what the whole ones do, and no element is read.

What decodes them is cut as they are, so their elements mean nothing without this rank's scales.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch

from tp_plugin.errors import TPError
from tp_plugin.shard.lazy_load import ABOUT
from tp_plugin.tensor.global_view.dispatch import run
from tp_plugin.tensor.global_view.info import register
from tp_plugin.tensor.global_view.operands import tensors_in


class CodesError(TPError, AttributeError):
    """Somebody looks for what is not there: whoever only asks whether it is, is answered."""


def refuse(parameter: Any, what: str) -> NoReturn:
    """Raise for ``what`` is done to a weight in codes."""
    info = parameter.tp_global
    raise CodesError(
        f"{info.peers.line()}: {what} of {info.name!r}, which is quantized and cut over the TP group: a rank holds its "
        "own codes and scales only. Call the model, or read the weight before accelerator.prepare"
    )


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _hidden(name: str) -> property:
    def get(parameter: Any) -> Any:
        refuse(parameter, name)

    def put(parameter: Any, value: Any) -> None:
        refuse(parameter, name)

    return property(get, put)


def _shown(kind: type, hidden: tuple[str, ...]) -> type:
    """The class in which a parameter of class ``kind`` looks whole."""

    class Shown(kind):  # type: ignore[misc]
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in ABOUT or function == _SET_DATA:
                return run(function, args, kwargs or {})
            name = getattr(function, "__name__", "")
            codes = next(each for each in tensors_in((args, kwargs)) if type(each) is cls)
            if function is torch.Tensor.detach:  # a state dict is of detached ones
                with torch._C.DisableTorchFunctionSubclass():
                    made: Any = torch.Tensor._make_subclass(cls, codes.detach())
                made.tp_global = codes.tp_global
                return made
            refuse(codes, name if name != "__get__" else getattr(function.__self__, "__name__", name))

        def to(self, *args: Any, **kwargs: Any) -> Any:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            if device not in (None, self.device) or dtype not in (None, self.dtype):
                refuse(self, f"to({device or dtype})")
            return self

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            if id(self) not in memo:
                shown = type(self)
                self.__class__ = kind
                try:
                    memo[id(self)] = copied = kind.__deepcopy__(self, memo)  # type: ignore[attr-defined]
                finally:
                    self.__class__ = shown
                entry = getattr(self, "tp_entry", None)
                if entry is not None:
                    entry.copy_to(copied)
            return memo[id(self)]

        def __reduce_ex__(self, protocol: Any) -> Any:
            refuse(self, "pickling")

        def __repr__(self, *, tensor_contents: Any = None) -> str:
            return f"{kind.__name__} of {tuple(self.shape)}, {self.dtype}: {self.tp_global.describe()}"

    Shown.__name__ = Shown.__qualname__ = kind.__name__  # by which libraries know it
    for name in hidden:
        setattr(Shown, name, _hidden(name))
    return Shown


@functools.cache
def _four_bits() -> type:
    from bitsandbytes.nn.modules import Params4bit

    return _shown(Params4bit, ("quant_state", "absmax", "state2", "nested_absmax"))


@functools.cache
def _eight_bits() -> type:
    from bitsandbytes.nn.modules import Int8Params

    return _shown(Int8Params, ("CB", "SCB"))


register("Params4bit", _four_bits)
register("Int8Params", _eight_bits)
