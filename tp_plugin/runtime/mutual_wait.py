"""Ends a wait that nothing can end: ranks of a unit that are in different collectives of theirs, each for the other.

A collective of the unit needs all of its ranks, and a rank (or its device) that is in one gets to no other. So if every
rank of the unit is in a collective of the unit, and not all in the same, none will ever leave it. A blocked main thread
cannot raise: the last rank of the unit leaves a report and ends its process, and the backend raises on the others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tp_plugin.config.keys import ENV_ABORT_AFTER
from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.hang_report import say
from tp_plugin.runtime.script_position import script_line
from tp_plugin.runtime.transport import PeerTransport

ABORT = 30.0
"""Seconds that all ranks have to be in such a wait. ``TP_PLUGIN_ABORT_AFTER`` in the environment is another number."""

Wait = tuple[str, float, float, str]
"""A collective of the unit, when this rank began to wait in it, for how many seconds, and the script's line there."""


class MutualWait:
    """Watches the waits of a unit, on its last rank; the others answer.

    Args:
        leave_report: tells the world of what this rank is dying (:func:`tp_plugin.runtime.crash_report.leave`).
    """

    def __init__(self, mesh: Mesh, transport: PeerTransport, leave_report: Callable[[int, BaseException], None]):
        self._mesh, self._transport, self._leave_report = mesh, transport, leave_report
        self._patience = float(os.environ.get(ENV_ABORT_AFTER, ABORT))
        self._closed = threading.Event()
        transport.serve("wait in the unit", self._mine)
        if mesh.unit.rank == mesh.unit.size - 1:
            threading.Thread(target=self._watch, name="tp-mutual-wait", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _mine(self) -> Wait | None:
        wait = self._mesh.context.waiting.now()
        if wait is None or not wait.in_unit:
            return None
        return wait.what, wait.since, wait.seconds(), wait.line or script_line()

    def _watch(self) -> None:
        before: list[Wait] | None = None
        while not self._closed.wait(min(1.0, self._patience / 4)):
            found = self._for_good()
            if found and before and [wait[1] for wait in found] == [wait[1] for wait in before]:
                self._end(found)
            before = found

    def _for_good(self) -> list[Wait] | None:
        mine = self._mine()
        if mine is None or mine[2] < self._patience:
            return None
        try:
            waits = [self._transport.ask(rank, "wait in the unit") for rank in range(self._mesh.unit.size - 1)] + [mine]
        except (OSError, EOFError):  # a timeout, or a rank that is gone: the backend will say
            return None
        if any(wait is None or wait[2] < self._patience for wait in waits) or len({wait[0] for wait in waits}) == 1:
            return None
        return waits

    def _end(self, waits: list[Wait]) -> None:
        places = "; ".join(
            f"rank {rank} at {line}, for {seconds:.0f} s in {what}"
            for rank, (what, _, seconds, line) in zip(self._mesh.unit.ranks, waits, strict=True)
        )
        error = DivergenceError(f"the ranks of a TP group wait for each other, and would for good: {places}")
        self._leave_report(self._mesh.rank, error)
        say(f"{error}. Make the call on every rank, or under accelerator.is_main_process")
        os._exit(1)
