"""Calls that ranks leave together, such as a save: none changes what another still reads, and all see one outcome."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.last_micro_batch import Known, LastMicroBatch
from tp_plugin.runtime.script_position import in_torch_collective
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.runtime.transport import PeerTransport

GRACE = 5.0
"""Seconds that a reader stays for a peer of which nothing shows whether it will make the same call."""

BLOCKED = 1.0
"""Seconds in a collective of the script's own after which a rank is taken to wait for the one that asks."""

TELL = 1.0
"""Seconds between two signs of progress to other units."""

_SILENT = {
    "clock": 0, "busy": 0.0, "leaving": False, "open": True, "parked": "", "finished": 0, "failed": None,
    "saving": None,
}  # fmt: skip
"""The status of a peer that does not answer: it is there, and what it does takes long."""


class Sessions:
    """This rank's part in such calls, by their names.

    Attributes:
        parked: the call at whose end this rank waits for the others; empty if it does not.
        parked_since: ``time.monotonic()`` of when that began.
        leaving: whether this rank is at the end of its script.
        entered: calls that this rank has entered so far, and which of them is the outermost that it is in.
        while_parked: what this rank does for the others while it waits at the end of a call.
        tell_world: tells other units that a save goes on.
    """

    def __init__(
        self,
        mesh: Mesh,
        transport: PeerTransport,
        sync_points: SyncPoints,
        last_micro_batch: LastMicroBatch,
        save_timeout: float,
    ):
        self._mesh, self._transport, self._sync_points = mesh, transport, sync_points
        self._last, self._save_timeout = last_micro_batch, save_timeout
        self._open: set[str] = set()
        self._together: list[str] = []
        self._progressed = self._told = time.monotonic()
        self.entered = self.outermost = 0
        self._finished: Counter[tuple[str, int]] = Counter()
        self._failed: dict[tuple[str, int], bytes] = {}
        self.parked = ""
        self.parked_since: float | None = None
        self.leaving = False
        self.while_parked: Callable[[], None] = lambda: None
        self.tell_world: Callable[[], object] = lambda: None
        sync_points.somebody_saves = self._somebody_saves
        transport.serve("status", self._show_status)
        transport.serve("presence", self._show_presence)
        transport.serve("last micro-batch", self._show_last)

    @contextlib.contextmanager
    def together(self, session: str) -> Iterator[None]:
        """A call that ranks leave together: a peer that does nothing in it returns when the leader's work is done.

        What one rank raises in it, all that made the call raise: a disk that is full for the leader is full for the
        process that the unit is. The leader first looks whether the last micro-batch was one on all ranks.
        """
        self.enter(session)
        self._together.append(session)
        try:
            if self._mesh.is_leader:
                self._compare_last()
            yield
        except Exception as error:
            self._together.remove(session)
            self.leave(session, error)
            raise
        except BaseException:
            self._together.remove(session)
            self.close(session)
            raise
        self._together.remove(session)
        self.leave(session)

    def together_in(self) -> list[str]:
        """The calls of :meth:`together` that this rank is in, the outermost first."""
        return list(self._together)

    def enter(self, session: str) -> None:
        """This rank begins a call in which shards are read, here or on another rank."""
        self.entered += 1
        if not self._open:
            self.outermost = self.entered
        self._open.add(session)
        self.progressed()

    def progressed(self) -> None:
        """A save goes on here: a tensor was read, or a file written."""
        now = time.monotonic()
        if now - self._told > TELL:
            self._told = now
            self.tell_world()
        self._progressed = now

    def close(self, session: str) -> None:
        """This rank has done its work in a call, and waits for nobody."""
        self._open.discard(session)

    def leave(self, session: str, error: Exception | None = None) -> None:
        """Stay until every rank that made the same call has finished it; ranks elsewhere are not waited for.

        Raises:
            Exception: what another rank raised in it, if this one has no ``error`` of its own.
        """
        at = (session, self._sync_points.clock)
        if error is not None:
            self._failed[at] = _sent(error, self._mesh.rank, session)
        self._finished[at] += 1
        self._open.discard(session)
        self.parked, self.parked_since = session, time.monotonic()
        patience = time.monotonic() + GRACE
        waiting = self.peers()
        failures: list[bytes] = []
        while waiting:
            statuses = {rank: self.status(rank, *at) for rank in waiting}
            impatient = time.monotonic() > patience
            through = [rank for rank, status in statuses.items() if self._is_through(status, at, impatient)]
            failures += [status["failed"] for rank in through if (status := statuses[rank]) and status["failed"]]
            waiting = [rank for rank in waiting if rank not in through]
            self.while_parked()
            if waiting:
                time.sleep(0.005)
        self.parked, self.parked_since = "", None
        if failures and error is None:
            told, why = pickle.loads(failures[0])
            raise told from DivergenceError(why)

    def is_joined(self, session: str) -> bool:
        """On the leader, which has entered ``session``: whether its peers come to the call, too.

        Waits until each has come, or is beyond it: in a collective of the unit that this rank has not entered, at its
        end, or, for a while, in a collective of the script's own.
        """
        waiting_since = None
        while True:
            begun = self._mesh.context.stats.unit_collectives
            try:
                seen = {self._transport.ask(rank, "presence", session, begun) for rank in self.peers()}
            except (EOFError, OSError):
                return False  # that rank is gone
            if seen == {"here"} or "beyond" in seen:
                return seen == {"here"}
            waiting_since = (waiting_since or time.monotonic()) if "waiting" in seen else None
            if waiting_since is not None and time.monotonic() - waiting_since > BLOCKED:
                return False
            time.sleep(0.002)

    def peers(self) -> list[int]:
        """The other ranks of the unit."""
        return [rank for rank in range(self._mesh.unit.size) if rank != self._mesh.unit.rank]

    def status(self, rank: int, session: str = "", clock: int = 0) -> dict[str, Any] | None:
        """Where rank ``rank`` is, and what became of ``session`` there; None if it is gone."""
        try:
            status: dict[str, Any] = self._transport.ask(rank, "status", session, clock)
            return status
        except TimeoutError:
            return _SILENT
        except (EOFError, OSError):
            return None

    def _somebody_saves(self) -> bool:
        statuses = [self.status(rank) for rank in self.peers()]
        since = [status["saving"] for status in statuses if status is not None]
        return any(seconds is not None and seconds < self._save_timeout for seconds in since)

    def _is_through(self, status: dict[str, Any] | None, at: tuple[str, int], impatient: bool) -> bool:
        if status is None or status["leaving"] or status["clock"] > self._sync_points.clock:
            return True
        if status["parked"] in self._open:
            return True  # it waits for this rank in an outer call, of which this one is a part
        return bool(status["finished"] >= self._finished[at] or (impatient and not status["open"]))

    def _show_status(self, session: str, clock: int) -> dict[str, Any]:
        return {
            "clock": self._sync_points.clock,
            "busy": self._mesh.context.waiting.seconds(),
            "leaving": self.leaving,
            "open": session in self._open,
            "parked": self.parked,
            "finished": self._finished[session, clock],
            "failed": self._failed.get((session, clock)),
            "saving": time.monotonic() - self._progressed if self._open else None,
        }

    def _compare_last(self) -> None:
        """Peers may be anywhere; what all know of the same backward is compared, and the rest where they meet."""
        try:
            known = [self._show_last(), *(self._transport.ask(rank, "last micro-batch") for rank in self.peers())]
        except (EOFError, OSError):
            return  # that rank is gone, or does not answer
        if len({at for at, _ in known}) == 1:
            self._last.judge([one for _, one in known])

    def _show_last(self) -> tuple[tuple[int, int], Known]:
        return (self._sync_points.clock, self._last.backwards), self._last.known()

    def _show_presence(self, session: str, begun: int) -> str:
        if session in self._open:
            return "here"
        if self.leaving or self._mesh.context.stats.unit_collectives > begun:
            return "beyond"
        return "waiting" if in_torch_collective() else "behind"


def _sent(error: Exception, rank: int, session: str) -> bytes:
    why = f"rank {rank} failed in {session!r}: {type(error).__name__}: {error}"
    try:
        sent = pickle.dumps((error, why))
        pickle.loads(sent)
        return sent
    except Exception:  # an exception may hold anything
        return pickle.dumps((DivergenceError(why), why))
