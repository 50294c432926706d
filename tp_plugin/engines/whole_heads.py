"""Library code that multiplies by ``lm_head.weight`` itself, and would take a rank's rows of it for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current
from tp_plugin.shard.params import is_unnamed_shard
from tp_plugin.tensor.param_entry import layout_of


def is_share(value: object) -> bool:
    """Whether ``value`` is a parameter of which a rank has a part, or a copy with the shape of a vocabulary's rows."""
    if not isinstance(value, torch.Tensor):
        return False
    layout, runtime = layout_of(value), current()
    if layout is None:
        return runtime is not None and is_unnamed_shard(value, [model.index for model in runtime.models])
    return layout.is_sharded


def refusing(who: str, instead: str) -> Callable[..., Any]:
    """A wrapper, see ``patching.wrap``, of a function that must not be given a share."""

    def checked(original: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_share, (*args, *kwargs.values()))):
            raise TPError(
                f"{who} multiplies by lm_head.weight itself, of which a rank has a part under tp_size, and would take "
                f"it for all of the vocabulary; {instead}, or set tp_size: 1"
            )
        return original(*args, **kwargs)

    return checked
