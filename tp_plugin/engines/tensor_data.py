"""``other.data = p.data``: torch asks only ``other`` about it, which is a tensor of no sharded model, and takes memory.

So whoever is assigned what looks whole must be asked for more: all of what was computed, and an error for a parameter's
own memory, which ``other`` would share.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.engines.patching import patch
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current


def install() -> None:
    """Patch ``torch.Tensor``, which inherits the attribute."""
    patch(torch.Tensor, "data", CheckedData(torch.Tensor.data), inherited=True)


class CheckedData:
    """Stands in ``torch.Tensor.data``; who asks the class for it gets torch's own, by which it knows the attribute."""

    def __init__(self, own: Any):
        self.own = own

    def __get__(self, tensor: Any, kind: Any = None) -> Any:
        return self.own if tensor is None else self.own.__get__(tensor)

    def __set__(self, tensor: Any, value: Any) -> None:
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            value = _for_others(tensor, value)
        self.own.__set__(tensor, value)


def _for_others(tensor: Any, value: Any) -> Any:
    """What ``tensor`` is to be given for ``value``. Collective if that looks whole, and ``tensor`` does not.

    Raises:
        TPError: ``value`` is a parameter or a gradient itself, and ``tensor`` would share its memory.
    """
    from tp_plugin.tensor.global_view import info_of, is_global
    from tp_plugin.tensor.global_view.operands import wholes_in

    info, runtime = info_of(value), current()
    if info is None or runtime is None or is_global(tensor):
        return value
    if runtime.region.holds(value):
        raise TPError(
            f"{info.peers.line()}: .data of a tensor of no sharded model, of shape {tuple(tensor.shape)}, was to get "
            f"the memory of {info.name!r}, but {info.describe()}; write tensor.copy_(p) or tensor.data = "
            "p.data.clone(), which give it the values of the whole"
        )
    return wholes_in(value).detach()
