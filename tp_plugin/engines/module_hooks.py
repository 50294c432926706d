"""Hooks that a script registers on modules of a sharded model: they get what one process has there."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.engines.patching import wrap

REGISTRARS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


def install() -> None:
    """Patch ``nn.Module``."""
    for name in REGISTRARS:
        wrap(nn.Module, name, _register)


def _register(original: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = original(self, *args, **kwargs)
    at: Any = vars(self).get("tp_hooks")
    if at is not None and at.region.is_script:  # else an engine's own
        at.adopt(self, handle.id)
    return handle
