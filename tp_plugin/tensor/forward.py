"""A module's ``forward`` wrapped on the instance: whatever it was (the class's, the instance's, a patch) runs inside.

The class stays what it is, so ``isinstance`` checks, names and hooks do, too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from tp_plugin.tensor.global_view import any_global

Forward = Callable[..., torch.Tensor]


class WrappedForward:
    """Stands in ``module.forward``; a deep copy of the module gets one that is bound to the copy.

    Args:
        module: the module.
        own: its forward as it stood.

    Attributes:
        method: the method that it stands in for.
    """

    method = "forward"

    def __init__(self, module: nn.Module, own: Forward):
        self.module, self.own = module, own

    @classmethod
    def install(cls, module: nn.Module, *args: Any) -> None:
        """Wrap the forward of ``module``; ``args`` go to the constructor after the module and its forward."""
        setattr(module, cls.method, cls(module, getattr(module, cls.method), *args))

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """:meth:`run` in a step. Where the script calls the module by itself: the module's own, on whole weights."""
        if any_global(self.module._parameters.values()):
            return self.own(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the module computes on this rank."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> WrappedForward:
        made = object.__new__(type(self))
        memo[id(self)] = made
        module = memo[id(self.module)]
        for name, value in vars(self).items():
            setattr(made, name, module if value is self.module else copy.deepcopy(value, memo))
        if isinstance(self.own, MethodType) and self.own.__self__ is self.module:
            made.own = MethodType(self.own.__func__, module)
        return made


def runs_as(own: Forward, kind: type[nn.Module]) -> bool:
    """Whether ``own`` is the forward that ``kind`` defines, so that its formula may be written out."""
    return isinstance(own, MethodType) and own.__func__ is kind.forward


@contextlib.contextmanager
def without_bias(module: nn.Module) -> Iterator[None]:
    """Inside, ``module.bias`` is None; the parameter stays registered, so that ZeRO and FSDP find it where it was."""
    if getattr(module, "bias", None) is None:
        yield
        return
    vars(module)["bias"] = None
    try:
        yield
    finally:
        del vars(module)["bias"]
