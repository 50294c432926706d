"""Patches on third-party objects: one place, applied once, reversible."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_undo: list[Callable[[], None]] = []
"""What takes back each patch, in the order in which they were made."""


def patch(owner: Any, name: str, replacement: Any) -> None:
    """Replace attribute ``name`` of a module or class and remember what stood there."""
    undo(functools.partial(setattr, owner, name, vars(owner)[name]))
    setattr(owner, name, replacement)


def undo(action: Callable[[], None]) -> None:
    """Have :func:`unpatch_all` call ``action``: for what is registered with a library by a way of its own."""
    _undo.append(action)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace function ``name`` of ``owner`` by ``wrapper(original, *args, **kwargs)``."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.tp_patched = True  # type: ignore[attr-defined]
    patch(owner, name, wrapped)


def unpatch_all() -> None:
    """Put everything back, last patch first."""
    while _undo:
        _undo.pop()()
