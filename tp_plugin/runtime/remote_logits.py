"""How ranks read logits together, or one of them alone.

What a script does with ``outputs.logits`` it mostly does on all ranks, which then communicate in a collective. But it
may do it on the main process only, while its peers go on into the backward's collectives and wait there. So a rank that
is about to communicate asks the others' threads first: they are at the same operation, or come to it, or have passed.
If not all are there, the rank reads the others' columns from their threads and computes for itself.

The leader decides, because all must decide alike: it claims the peers that are where it is, and tells them.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
import weakref
from typing import Any

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.script_position import in_torch_collective
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.runtime.transport import PeerTransport
from tp_plugin.tensor.peer_reads import Held, Number, Output

PATIENCE = 10.0
"""Seconds that a rank waits for others that are nowhere, such as in a barrier of the script's own.

Then it reads alone, and whoever comes later does, too: right all the same, but all columns travel.
"""

STUCK = 0.5
"""Seconds after which another rank in a collective of torch's, not this plugin's, is taken to wait for this one."""

_VERDICTS = 64
"""Decisions that a leader remembers for peers that have not asked yet."""


class RemoteLogits:
    """This rank's part in the reading of logits, a :class:`~tp_plugin.tensor.peer_reads.PeerReads`."""

    def __init__(self, mesh: Mesh, transport: PeerTransport, sync_points: SyncPoints, progress: Progress):
        self._mesh, self._transport, self._sync_points, self._progress = mesh, transport, sync_points, progress
        self._stats, self._deferred = mesh.context.stats, mesh.context.deferred
        self._held: weakref.WeakValueDictionary[Number, Held] = weakref.WeakValueDictionary()
        self._newest = (-1, 0)
        self._lock = threading.Lock()
        self._at: str | None = None
        self._claim: int | None = None
        self._count = 0
        self._verdicts: dict[int, bool | None] = {}
        transport.serve("claim", self._claimed)
        transport.serve("whereabouts", self._whereabouts)
        transport.serve("verdict", self._verdict)
        transport.serve_tensor("columns", self._columns)

    @property
    def wants_full(self) -> bool:
        """Whether logits are wanted whole, at once."""
        return self._sync_points.wants_full_logits

    @property
    def in_forward(self) -> bool:
        """Whether a forward of a sharded model is running: then all ranks are at the same operation."""
        return self._sync_points.depth > 0

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._progress.optimizer_steps

    def hold(self, data: Output, device: torch.device) -> Held:
        """Register a head's output, so that other ranks may read it for as long as the script may."""
        clock, serial = self._newest
        self._newest = (clock, serial + 1) if clock == self._sync_points.clock else (self._sync_points.clock, 0)
        held = Held(self._newest, data, device, self._deferred.put)
        self._held[held.number] = held
        return held

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteLogits:
        return self

    def propose(self, operation: str, newest: tuple[int, int] | None = None) -> bool:
        """Whether all ranks of the group are at ``operation`` now, and may communicate.

        Args:
            newest: the last made of the heads' outputs that it reads. A rank that has not made it is in that forward
                still, as all ranks met at its beginning, and is waited for: in a collective of FSDP2 or ZeRO-3 it
                waits for another replica, not for this rank.
        """
        with self._lock:
            self._at, self._claim = operation, None
        try:
            if self._mesh.is_leader:
                return self._lead(operation, newest)
            return self._follow(operation, newest)
        finally:
            with self._lock:
                self._at = None

    def read(self, rank: int, number: Number, device: torch.device) -> torch.Tensor:
        """The columns of TP rank ``rank``, of the head's output ``number``, on ``device``."""
        try:
            found = self._transport.fetch(rank, "columns", number)
        except (EOFError, OSError) as error:
            raise DivergenceError(f"cannot read the logits of TP rank {rank}, which has left ({error})") from error
        return found.to(device)

    def _lead(self, operation: str, newest: tuple[int, int] | None) -> bool:
        self._count += 1
        token = self._count
        with self._lock:
            self._verdicts[token] = None
            self._verdicts.pop(token - _VERDICTS, None)
        waiting = list(range(1, self._mesh.unit.size))
        pause = _Pause()
        verdict = None
        while verdict is None:
            replies = {
                rank: self._ask(rank, "claim", operation, self._stats.unit_collectives, newest, token)
                for rank in waiting
            }
            waiting = [rank for rank in waiting if replies[rank] != "here"]
            if not waiting:
                verdict = True
            elif "elsewhere" in replies.values():
                verdict = False
            elif "coming" in replies.values():
                pause.on()
            elif pause.over("waiting" in replies.values()):
                _tell(operation)
                verdict = False
        self._verdicts[token] = verdict
        return verdict

    def _follow(self, operation: str, newest: tuple[int, int] | None) -> bool:
        pause = _Pause()
        while True:
            claim = self._claim
            if claim is not None:
                verdict = self._ask(0, "verdict", claim)
                if verdict is not None:
                    return verdict is True
                pause.sleep()
                continue
            where = self._ask(0, "whereabouts", operation, self._stats.unit_collectives, newest)
            if where == "coming":
                pause.on()
                continue
            waited = where != "elsewhere" and pause.over(where == "waiting")
            if waited:
                _tell(operation)
            if waited or where == "elsewhere":
                with self._lock:
                    if self._claim is None:
                        self._at = None
                        return False

    def _ask(self, rank: int, *request: Any) -> Any:
        try:
            return self._transport.ask(rank, *request)
        except (EOFError, OSError):
            return "elsewhere"  # that rank is gone

    def _whereabouts(self, operation: str, begun: int, newest: tuple[int, int] | None) -> str:
        if self._at == operation:
            return "here"
        if self._at is not None or self._stats.unit_collectives > begun:
            return "elsewhere"
        if newest is not None and self._newest < newest:
            return "coming"
        return "waiting" if in_torch_collective() else "behind"

    def _claimed(self, operation: str, begun: int, newest: tuple[int, int] | None, token: int) -> str:
        with self._lock:
            where = self._whereabouts(operation, begun, newest)
            if where == "here":
                self._claim = token
            return where

    def _verdict(self, token: int) -> bool | None:
        return self._verdicts.get(token, False)  # one that is forgotten was not to communicate

    def _columns(self, number: tuple[int, int]) -> torch.Tensor:
        held = self._held.get(number)
        found = (held.data, held.ready) if held is not None else self._deferred.get(number)
        if found is None:
            raise DivergenceError(
                "these logits are gone there: its script has dropped them and gone on. Read them on every rank, or "
                "before the next step"
            )
        data, ready = found
        if ready is None:
            return _values(data)
        module = torch.get_device_module(ready.device)
        stream = module.Stream(device=ready.device)  # not behind a collective that waits for the reader
        with module.stream(stream):
            stream.wait_event(ready)
            host: torch.Tensor = _values(data).cpu()
            return host


def _values(data: Output) -> torch.Tensor:
    return data if isinstance(data, torch.Tensor) else data()


@functools.cache
def _tell(operation: str) -> None:
    warnings.warn(
        f"other ranks of the TP group did not come to an operation on logits ({operation}); they were read from them",
        stacklevel=2,
    )


class _Pause:
    def __init__(self) -> None:
        self.length = 0.0
        self.on()

    def on(self) -> None:
        """Sleep, with patience renewed."""
        self.sleep()
        self.until = time.monotonic() + PATIENCE
        self.stuck: float | None = None

    def sleep(self) -> None:
        """Longer each time."""
        time.sleep(self.length)
        self.length = min(2 * self.length or 0.0001, 0.005)

    def over(self, waiting: bool) -> bool:
        """Sleep; whether that has gone on for too long, with someone ``waiting`` for this rank or without."""
        self.sleep()
        now = time.monotonic()
        self.stuck = (self.stuck or now) if waiting else None
        return now > self.until or (self.stuck is not None and now - self.stuck > STUCK)
