"""What a rank tells the world before it dies of an exception.

Reports are left in torch.distributed's key-value store, which every launcher keeps outside of the ranks or on rank 0:
so they reach the ranks of other units too, and outlive who left them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.config.environment import is_summarised
from tp_plugin.runtime.hang_report import HangReport, say
from tp_plugin.runtime.script_position import failing_line

DEATHS = "tp_plugin/deaths"
LONGEST = 1200
"""Characters of a message that are kept."""

NEWS = 5.0
"""Seconds that a rank which dies because it lost others waits for the report of the one that was first."""


class CrashReport:
    """Installs itself in ``sys.excepthook``; :meth:`close` takes it back.

    Attributes:
        crashed: whether this process is dying of an exception.
        memory_advice: gives what could be done about a device that has no memory left.
    """

    def __init__(self, rank: int, hang_report: HangReport):
        self.crashed = False
        self.memory_advice: Callable[[], str] | None = None
        self._rank, self._hang_report = rank, hang_report
        self._previous = sys.excepthook
        sys.excepthook = self._note

    def close(self) -> None:
        """Put back what stood there, unless somebody has put another hook on top."""
        if sys.excepthook == self._note:
            sys.excepthook = self._previous

    def _note(self, kind: type[BaseException], value: BaseException, trace: Any) -> None:
        self.crashed = True
        if isinstance(value, torch.OutOfMemoryError) and self.memory_advice is not None:
            text, *rest = value.args or ("",)
            value.args = (f"{text}\n(tp_plugin: {self.memory_advice()})", *rest)
        leave(self._rank, value)
        self._previous(kind, value, trace)
        words = f"{kind.__name__}: {value}"
        if has_lost_others(words) and "without a word" not in words and not is_summarised():
            self._tell_who_was_first()

    def _tell_who_was_first(self) -> None:
        deadline = time.monotonic() + NEWS
        while True:
            news = self._hang_report.news(living=False)
            others = [word for word in news if not word.startswith(f"rank {self._rank} ")]
            first = [word for word in others if "without a word" in word or not has_lost_others(word)]
            if first or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if others:
            say(f"what rank {self._rank} heard of the others: {'; '.join(first or others)}")


def has_lost_others(words: str) -> bool:
    """Whether an error's text says that other ranks of a collective did not come."""
    # DDP's own collectives raise what the backend says, which names no rank
    return any(sign in words for sign in ("LostRankError", "Connection closed", "Connection reset", "Timed out"))


def leave(rank: int, error: BaseException) -> None:
    """Tell the world of what ``rank`` is dying."""
    line = failing_line(error)
    where = f" at {line}" if line else ""
    text = f"rank {rank} died of {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # there may be no store any more
        store = dist.distributed_c10d._get_default_store()
        number = store.add(DEATHS, 1)
        store.set(f"{DEATHS}/{number}", f"{text[:LONGEST]}{where}")


def read() -> list[str]:
    """The reports of the world so far, first who died first."""
    found: list[str] = []
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        for number in range(1, store.add(DEATHS, 0) + 1):
            if store.check([f"{DEATHS}/{number}"]):
                found.append(store.get(f"{DEATHS}/{number}").decode())
    return found
