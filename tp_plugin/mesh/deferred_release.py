"""What this rank has dropped but a slower peer may still read, kept until all ranks have met in a collective.

A peer that comes to a collective has left behind everything before it. So what was dropped before this rank entered one
can go when that one has completed.
"""

from __future__ import annotations

import threading
from typing import Any

import torch


class DeferredRelease:
    """Values by key, from :meth:`put` until a collective that began later has completed."""

    def __init__(self) -> None:
        self._items: dict[Any, Any] = {}
        self._fences: list[tuple[torch.Event, list[Any]]] = []
        self._lock = threading.RLock()  # an item may be put by a finalizer, at any time

    def put(self, key: Any, value: Any) -> None:
        """Keep ``value``."""
        with self._lock:
            self._items[key] = value

    def get(self, key: Any) -> Any:
        """The value, or None if it has gone."""
        with self._lock:
            return self._items.get(key)

    def before(self) -> list[Any]:
        """Call when a collective begins; returns what :meth:`after` takes."""
        while self._fences and self._fences[0][0].query():
            self._release(self._fences.pop(0)[1])
        return list(self._items) if self._items else []

    def after(self, keys: list[Any], device: torch.device) -> None:
        """Call when the collective has completed; on a device, when it is enqueued on the current stream."""
        if not keys:
            return
        if device.type == "cpu":
            self._release(keys)
            return
        event = torch.Event(device)
        event.record()
        self._fences.append((event, keys))

    def _release(self, keys: list[Any]) -> None:
        with self._lock:
            for key in keys:
                self._items.pop(key, None)
