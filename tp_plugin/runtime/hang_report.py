"""What a rank says when others do not come: who died of what, who is gone, at which line of the script the living are.

A collective that fails and a wait that is long are told about; nothing here changes what happens.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from tp_plugin.config.keys import ENV_NOTICE_AFTER
from tp_plugin.mesh.hosts import comes_first
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.script_position import script_line
from tp_plugin.runtime.sessions import Sessions
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.runtime.transport import PeerTransport

NOTICE = 60.0
"""Seconds in one collective, or at the end of a joint call, after which a rank says on stderr whom it waits for.

``TP_PLUGIN_NOTICE_AFTER`` in the environment is another number of them.
"""


class HangReport:
    """Watches the waits of this rank, and answers others where it is.

    Args:
        deaths: the reports that dying ranks have left.
    """

    def __init__(
        self,
        mesh: Mesh,
        transport: PeerTransport,
        sync_points: SyncPoints,
        sessions: Sessions,
        deaths: Callable[[], list[str]],
    ):
        self._mesh, self._transport, self._sync_points, self._sessions = mesh, transport, sync_points, sessions
        self._deaths = deaths
        self._notice = float(os.environ.get(ENV_NOTICE_AFTER, NOTICE))
        self._closed = threading.Event()
        transport.serve("where", self._where)
        mesh.context.waiting.explain, mesh.context.waiting.script_line = self._explain, script_line
        threading.Thread(target=self._look, name="tp-hang-report", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._mesh.context.waiting.explain = None
        self._closed.set()

    def news(self, living: bool = True) -> list[str]:
        """The reports of the world's dead, who of the unit is gone without one, and where its living are."""
        news = self._deaths()
        for at, rank in enumerate(self._mesh.unit.ranks):
            if at == self._mesh.unit.rank or any(word.startswith(f"rank {rank} died") for word in news):
                continue
            try:
                place = self._transport.ask(at, "where")
                news += [f"rank {rank} is {place}"] if living else []
            except TimeoutError:
                news.append(f"rank {rank} does not answer: its process is stopped, or in one long call")
            except (EOFError, OSError):
                news.append(f"rank {rank} is gone without a word: killed from outside (a signal, out of memory)")
        return news

    def _where(self) -> str:
        wait = self._mesh.context.waiting.now()
        waits = "busy" if wait is None else f"for {wait.seconds():.0f} s in {wait}"
        return f"at {script_line()}, {waits}"

    def _explain(self, what: str, error: RuntimeError) -> str:
        place = self._sync_points.place
        came = f", as it came to {place}" if place else ""
        return f"rank {self._mesh.rank} lost other ranks in {what}{came}: {'; '.join(self.news())} ({error})"

    def _look(self) -> None:
        told: float | None = None
        since: float | None
        waiting, stats = self._mesh.context.waiting, self._mesh.context.stats
        while not self._closed.wait(min(1.0, self._notice / 4)):
            wait = waiting.now()
            if wait is not None:
                since, what = wait.since, str(wait)
            else:
                since = self._sessions.parked_since
                what = f"{self._sessions.parked!r}, for those that made the same call"
            if since is None or since == told or time.monotonic() - since < self._notice or self._sessions.leaving:
                continue
            told = since
            matter = f"wait {self._mesh.data.rank} {self._sync_points.clock} {stats.unit_collectives}"
            try:
                if comes_first(matter):
                    waited = f"rank {self._mesh.rank} has waited {time.monotonic() - since:.0f} s in {what}"
                    say(f"{waited}, at {script_line()}; {'; '.join(self.news())}")
            except RuntimeError:
                return  # there is no store any more: the run ends


def say(text: str) -> None:
    """Print one message of the plugin on stderr."""
    print(f"tp_plugin: {text}", file=sys.stderr, flush=True)
