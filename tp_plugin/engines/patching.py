"""Patches on third-party objects: one place, applied once, reversible."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

_originals: list[tuple[Any, str, Any]] = []
_registered: list[Any] = []
"""Handles of what was registered with a library by a way of its own."""
INHERITED = object()
"""Stands for an original that the class has from another."""


def patch(owner: Any, name: str, replacement: Any, inherited: bool = False) -> None:
    """Replace attribute ``name`` of a module or class and remember what stood there; ``inherited``: nothing did."""
    _originals.append((owner, name, INHERITED if inherited else vars(owner)[name]))
    setattr(owner, name, replacement)


def remember(handle: Any) -> None:
    """Have :func:`unpatch_all` call ``handle.remove()``: of a library's hook, or of a note that a patch is there."""
    _registered.append(handle)


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
    _take_back(0, 0)


def put_back(owner: Any, name: str, original: Any) -> None:
    """Undo one patch: ``original`` is what was remembered of it."""
    if original is INHERITED:
        delattr(owner, name)
    else:
        setattr(owner, name, original)


@contextlib.contextmanager
def taken_back() -> Iterator[None]:
    """At the end, what was patched and remembered inside is taken back, and nothing else."""
    patched, remembered = len(_originals), len(_registered)
    try:
        yield
    finally:
        _take_back(patched, remembered)


def _take_back(patched: int, remembered: int) -> None:
    while len(_originals) > patched:
        put_back(*_originals.pop())
    while len(_registered) > remembered:
        _registered.pop().remove()
