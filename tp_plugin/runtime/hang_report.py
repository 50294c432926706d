"""What a rank says when others do not come: who died of what, who is gone, and at which line of the script who else is.

A collective that fails, a wait that is long and a crash are told about; nothing here changes what happens.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from tp_plugin.config.keys import ENV_NOTICE_AFTER
from tp_plugin.mesh import groups
from tp_plugin.mesh.hosts import comes_first
from tp_plugin.runtime import crash_report

if TYPE_CHECKING:
    from tp_plugin.runtime.transport import PeerTransport

NOTICE = 60.0
"""Seconds in one collective, or for one peer's part of a save, after which a rank says on stderr whom it waits for.

``TP_PLUGIN_NOTICE_AFTER`` in the environment is another number of them.
"""

NEWS = 5.0
"""Seconds that a rank which dies because it lost others stays for the word of the one that was first."""

crashed = False
"""Whether this process is dying of an exception."""

_watch: HangReport | None = None


class HangReport:
    """Looks after the waits of this rank, and answers others where it is; lives as long as the exchange."""

    def __init__(self, exchange: PeerTransport):
        global _watch
        _watch = self
        self.exchange, self.mesh = exchange, exchange.mesh
        exchange.services["where"] = self._where
        groups.explain = self._explain
        self._notice = float(os.environ.get(ENV_NOTICE_AFTER, NOTICE))
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="tp-watch", daemon=True).start()

    def close(self) -> None:
        """HangReport no more."""
        global _watch
        _watch = groups.explain = None
        self._closed.set()

    def _where(self) -> str:
        waits = f"for {time.monotonic() - since:.0f} s in {groups.busy_in}" if (since := groups.busy_since) else "busy"
        return f"at {crash_report.whereabouts()}, {waits}"

    def _explain(self, what: str, error: RuntimeError) -> str:
        place = self.exchange.sync_points.place
        came = f", as it came to {place}" if place else ""
        return f"rank {self.mesh.rank} lost other ranks in {what}{came}: {'; '.join(self.news())} ({error})"

    def news(self, living: bool = True) -> list[str]:
        """The last words of the world's dead, who of the TP group is gone without any, and where its living are."""
        news = crash_report.read()
        for at, rank in enumerate(self.mesh.tp.ranks):
            if at == self.mesh.tp.rank or any(word.startswith(f"rank {rank} died") for word in news):
                continue
            try:
                place = self.exchange.ask(at, "where")
                news += [f"rank {rank} is {place}"] if living else []
            except TimeoutError:
                news.append(f"rank {rank} does not answer: its process is stopped, or in one long call")
            except (EOFError, OSError):
                news.append(f"rank {rank} is gone without a word: killed from outside (a signal, out of memory)")
        return news

    def _look(self) -> None:
        told = None
        while not self._closed.wait(min(1.0, self._notice / 4)):
            since, what = groups.busy_since, groups.busy_in
            if since is None:
                since, what = self.exchange.parked_since, f"{self.exchange.parked!r}, for those that made the same call"
            if since is None or since == told or time.monotonic() - since < self._notice or self.exchange.leaving:
                continue
            told = since
            try:
                if comes_first(f"wait {self.mesh.dp.rank} {self.exchange.sync_points.clock} {groups.meetings}"):
                    waited = f"rank {self.mesh.rank} has waited {time.monotonic() - since:.0f} s in {what}"
                    _say(f"{waited}, at {crash_report.whereabouts()}; {'; '.join(self.news())}")
            except RuntimeError:
                return  # there is no store any more: the run ends


def note_crashes() -> None:
    """Have this process leave word when it dies of an exception, and not wait for anybody at exit."""
    previous = sys.excepthook

    def note(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        global crashed
        crashed = True
        if _watch is not None:
            crash_report.leave(_watch.mesh.rank, value)
        previous(kind, value, trace)
        words = f"{kind.__name__}: {value}"
        if _watch is not None and _has_lost_others(words) and "without a word" not in words:
            _tell_who_was_first(_watch)

    if not getattr(previous, "leaves_word", False):
        note.leaves_word = True  # type: ignore[attr-defined]
        sys.excepthook = note


def _has_lost_others(words: str) -> bool:
    # DDP's own collectives raise what the backend says, which names no rank
    return any(sign in words for sign in ("LostRankError", "Connection closed", "Connection reset", "Timed out"))


def _tell_who_was_first(watch: HangReport) -> None:
    me, deadline = watch.mesh.rank, time.monotonic() + NEWS
    while True:
        others = [word for word in watch.news(living=False) if not word.startswith(f"rank {me} ")]
        first = [word for word in others if "without a word" in word or not _has_lost_others(word)]
        if first or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if others:
        _say(f"what rank {me} heard of the others: {'; '.join(first or others)}")


def _say(text: str) -> None:
    print(f"tp_plugin: {text}", file=sys.stderr, flush=True)
