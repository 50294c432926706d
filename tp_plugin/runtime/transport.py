"""One-sided reads: a rank fetches its TP peers' shards whenever the script asks for whole tensors.

Scripts save on the main process alone, or on all; they cannot be asked to make all ranks call a collective. So each
rank serves its shards from a thread, and whoever wants a whole tensor reads the rest. Two things keep this exact:

- a read is answered only when both ranks' weights are at the same point of the program (``fingerprint``: in-place
  versions of all parameters and the content of replicated ones); a peer that lags is waited for, a peer that has moved
  on is an error on the reader;
- ranks that make the same call leave it together (a session), so that none changes what another still reads; a peer
  that leaves the script stays until its leader leaves too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import operator
import os
import pickle
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.config.keys import ENV_READ_TIMEOUT
from tp_plugin.errors import DivergenceError
from tp_plugin.mesh import groups
from tp_plugin.mesh.groups import Mesh
from tp_plugin.mesh.hosts import Machine, address
from tp_plugin.runtime import hang_report
from tp_plugin.runtime.sync_points import END, SyncPoints

PATIENCE = float(os.environ.get(ENV_READ_TIMEOUT, "30"))
"""Seconds that a read waits for a peer to reach the same point of the program."""

GRACE = 5.0
"""Seconds that a reader stays for a peer of which nothing shows whether it will make the same call."""

UNANSWERED = 20.0
"""Seconds that a peer has to say where it is; it cannot while its process is stopped or a library holds the GIL."""

_SILENT = {"clock": 0, "busy": 0.0, "leaving": False, "open": True, "parked": "", "finished": 0, "failed": None}
"""The status of such a peer: it is there, and what it does takes long."""

STUCK = 20.0
"""Seconds in one collective after which a rank is taken to wait for one that has come to its end."""

BLOCKED = 1.0
"""Seconds in a collective of the script's own after which a rank is taken to wait for the one that asks."""


CHUNK = 1 << 20
"""Bytes that are sent at a time: a connection holds what it receives several times over."""


ELSEWHERE = "its weights are at another point of the program"


class Source(Protocol):
    """Something whose local tensors other ranks may read."""

    def fingerprint(self) -> object:
        """A value that is equal on two ranks exactly when their weights are at the same point of the program."""

    def apart(self, theirs: object) -> str:
        """What is the matter with these weights, if another rank's fingerprint is ``theirs``."""

    def local(self, key: str) -> torch.Tensor:
        """This rank's tensor of that name."""

    def alive(self) -> bool:
        """Whether the script still holds what the tensors belong to."""

    def keep(self) -> None:
        """Hold the tensors themselves from now on, so that they outlive their owner."""


class PeerTransport:
    """This rank's server and its connections to the other ranks of the TP group."""

    def __init__(self, mesh: Mesh):
        from tp_plugin.runtime.remote_logits import RemoteLogits  # which reads by this class

        self.mesh = mesh
        self.sync_points = SyncPoints(mesh, self._census, self._bury, self._find)
        self.leaving = False
        self._pid = os.getpid()
        self._sources: dict[str, Any] = {}
        self._order: list[str] = []
        self._open: set[str] = set()
        self.parked = ""
        self.parked_since: float | None = None
        self._finished: Counter[tuple[str, int]] = Counter()
        self._failed: dict[tuple[str, int], bytes] = {}
        self.services: dict[str, Callable[..., Any]] = {"status": self._show_status, "presence": self._show_presence}
        """More that other ranks may ask for by name: small answers (see :meth:`ask`)."""
        self.tensors: dict[str, Callable[..., torch.Tensor]] = {"read": self._read_at}
        """The same for tensors (see :meth:`fetch`)."""
        self.desk = RemoteLogits(self)
        """Where logits are read."""
        self._links: dict[int, Connection] = {}
        self._asking = threading.Lock()
        self._closed = False
        self._key = mesh.control.broadcast_object(secrets.token_bytes(32) if mesh.is_leader else None)
        self.machines = mesh.control.gather_objects(Machine.here())
        """Where the ranks of the TP group are, in rank order."""
        host = "127.0.0.1" if len(set(self.machines)) == 1 else address(mesh.control)
        self._listener = Listener((host, 0), backlog=mesh.tp_size, authkey=self._key)
        self._addresses = mesh.control.gather_objects(self._listener.address)
        threading.Thread(target=self._accept, name="tp-exchange", daemon=True).start()
        self._watch = hang_report.HangReport(self)

    def close(self) -> None:
        """Serve nobody any more; ends the threads, which hold the mesh and the sources."""
        self._closed = True
        self._watch.close()
        atexit.unregister(self.farewell)
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.address, timeout=1).close()  # wakes the thread that accepts
        for link in self._links.values():
            link.close()

    def publish(self, uid: str, source: Source) -> None:
        """Let other ranks read ``source`` under ``uid`` (the same on all ranks) for as long as any rank may ask.

        A peer's script may drop a model, or return from its main function, while the leader still saves it. So the
        exchange keeps the source, and lets go at a later meeting, once its owner is gone on every rank.
        """
        self._sources[uid] = source
        self._order.append(uid)

    def _census(self) -> tuple[int, int]:
        gone = 0
        for bit, uid in enumerate(self._order[:62]):
            self._sources[uid].keep()
            gone |= (not self._sources[uid].alive()) << bit
        return len(self._order), gone

    def _bury(self, everyone: list[tuple[int, int]]) -> None:
        counts, masks = zip(*everyone, strict=True)
        if len(set(counts)) > 1:
            return  # the ranks published different things; which bit is which cannot be told
        gone = functools.reduce(operator.and_, masks)
        for uid in [uid for bit, uid in enumerate(self._order[:62]) if gone >> bit & 1]:
            self._order.remove(uid)
            del self._sources[uid]

    def _find(self, number: int) -> nn.Module:
        models = [source for source in self._sources.values() if getattr(source, "number", None) == number]
        module: nn.Module = models[0].module()
        return module

    def read(self, uid: str, key: str, rank: int) -> torch.Tensor:
        """The tensor ``key`` of ``uid`` on TP rank ``rank``, on the CPU.

        Raises:
            DivergenceError: the peer is gone, or its weights did not come to this rank's point within PATIENCE.
        """
        try:
            return self.fetch(rank, "read", uid, key, self._sources[uid].fingerprint(), patience=PATIENCE + 30)
        except DivergenceError as error:
            raise DivergenceError(
                f"cannot read {key!r} from TP rank {rank}: {error}. Call the saving function at the same place "
                "on every rank, before anything changes the weights"
            ) from error
        except (EOFError, OSError) as error:
            reason = error or "connection closed"
            raise DivergenceError(f"cannot read {key!r}: TP rank {rank} has left ({reason})") from error

    def fetch(self, rank: int, *request: Any, patience: float = 60.0) -> torch.Tensor:
        """The tensor that TP rank ``rank`` answers ``request`` with, on the CPU.

        Raises:
            DivergenceError: the peer refuses, with its reason, or gives no answer within ``patience`` seconds.
            EOFError, OSError: the peer is gone.
        """
        with self._asking:
            link = self._link(rank)
            link.send(request)
            if not link.poll(patience):
                del self._links[rank]  # the answer may yet come, and would be taken for the next one's
                raise DivergenceError("it gives no answer")
            answer = link.recv()
            if answer[0] != "tensor":
                raise DivergenceError(answer[1])
            tensor = torch.empty(answer[2], dtype=answer[1])
            into, at = _bytes(tensor), 0
            while at < len(into):
                raw = link.recv_bytes()
                into[at : at + len(raw)] = raw
                at += len(raw)
        return tensor

    def ask(self, rank: int, *request: Any) -> Any:
        """What the service ``request[0]`` of TP rank ``rank`` answers.

        Raises:
            EOFError, OSError: the peer is gone.
            TimeoutError: it is there, but does not answer.
        """
        with self._asking:
            link = self._link(rank)
            link.send(request)
            if not link.poll(UNANSWERED):
                del self._links[rank]
                raise TimeoutError(f"no answer in {UNANSWERED:.0f} s")
            return link.recv()

    @contextlib.contextmanager
    def together(self, session: str) -> Iterator[None]:
        """A call that ranks leave together: a peer that does nothing in it returns when the leader's part is done.

        What one rank raises in it, all that made the call raise: a disk that is full for the leader is full for the
        process that the group is.
        """
        self.enter(session)
        try:
            yield
        except Exception as error:
            self.leave(session, error)
            raise
        except BaseException:
            self._open.discard(session)
            raise
        self.leave(session)

    def enter(self, session: str) -> None:
        """This rank begins a call in which shards are read, here or on another rank."""
        self._open.add(session)

    def close_session(self, session: str) -> None:
        """This rank has done its part of a call, and waits for nobody."""
        self._open.discard(session)

    def is_joined(self, session: str) -> bool:
        """On the leader, which has entered ``session``: whether its peers come to the call, too.

        Waits until each has come, or is beyond it: in a collective of the group that this rank has not entered, at its
        end, or, for a while, in a collective of the script's own.
        """
        peers, waiting_since = range(1, self.mesh.tp_size), None
        while True:
            try:
                seen = {self.ask(rank, "presence", session, groups.meetings) for rank in peers}
            except (EOFError, OSError):
                return False  # that rank is gone
            if seen == {"here"} or "beyond" in seen:
                return seen == {"here"}
            waiting_since = (waiting_since or time.monotonic()) if "waiting" in seen else None
            if waiting_since is not None and time.monotonic() - waiting_since > BLOCKED:
                return False
            time.sleep(0.002)

    def _show_presence(self, session: str, meetings: int) -> str:
        from tp_plugin.runtime.remote_logits import in_torch_collective

        if session in self._open:
            return "here"
        if self.leaving or groups.meetings > meetings:
            return "beyond"
        return "waiting" if in_torch_collective() else "behind"

    def leave(self, session: str, error: Exception | None = None) -> None:
        """Stay until every rank that made the same call has finished it; ranks elsewhere are not waited for.

        Raises:
            Exception: what another rank raised in it, if this one has no ``error`` of its own.
        """
        at = (session, self.sync_points.clock)
        if error is not None:
            self._failed[at] = _sent(error, self.mesh.rank, session)
        self._finished[at] += 1
        self._open.discard(session)
        self.parked, self.parked_since = session, time.monotonic()
        patience = time.monotonic() + GRACE
        waiting = [rank for rank in range(self.mesh.tp_size) if rank != self.mesh.tp.rank]
        failures: list[bytes] = []
        while waiting:
            statuses = {rank: self._status(rank, *at) for rank in waiting}
            impatient = time.monotonic() > patience
            through = [rank for rank, status in statuses.items() if self._is_through(status, at, impatient)]
            failures += [status["failed"] for rank in through if (status := statuses[rank]) and status["failed"]]
            waiting = [rank for rank in waiting if rank not in through]
            if waiting:
                time.sleep(0.005)
        self.parked, self.parked_since = "", None
        if failures and error is None:
            told, why = pickle.loads(failures[0])
            raise told from DivergenceError(why)

    def _is_through(self, status: dict[str, Any] | None, at: tuple[str, int], impatient: bool) -> bool:
        if status is None or status["leaving"] or status["clock"] > self.sync_points.clock:
            return True
        if status["parked"] in self._open:
            return True  # it waits for this rank in an outer call, of which this one is a part
        return bool(status["finished"] >= self._finished[at] or (impatient and not status["open"]))

    def farewell(self) -> None:
        """At exit: the ranks leave together, so that one which only saves or evaluates a last time finds its peers.

        Peers help with the leader's last forwards and are read meanwhile (after ``destroy_process_group``: only read).
        Who waits in vain is not waited for: a rank that is stuck in a collective because this one came to its end.
        """
        if hang_report.crashed or os.getpid() != self._pid:
            return  # what others wait for will not come, or this is a fork of the rank
        self.leaving = True
        meeting = threading.Thread(target=self._meet_at_the_end, daemon=True)
        meeting.start()
        others = [rank for rank in range(self.mesh.tp_size) if rank != self.mesh.tp.rank]
        while meeting.is_alive():
            meeting.join(timeout=0.05)
            stuck = [rank for rank in others if not self.sync_points.helping and self._is_stuck(rank)]
            if stuck:
                ranks = [self.mesh.tp.ranks[rank] for rank in stuck]
                print(
                    f"tp_plugin: rank {self.mesh.rank} is at the end of its script; ranks {ranks} of its TP group "
                    f"have been in a collective for {STUCK:.0f} s and are left there",
                    file=sys.stderr,
                )
                return

    def _meet_at_the_end(self) -> None:
        if torch.distributed.is_initialized():
            with contextlib.suppress(DivergenceError):  # raised on the rank that is not at its end, too
                self.sync_points.meet(END)
            return
        while not self.mesh.is_leader and (status := self._status(0)) and not status["leaving"]:
            time.sleep(0.05)

    def _is_stuck(self, rank: int) -> bool:
        status = self._status(rank)
        return status is not None and not status["leaving"] and status["busy"] > STUCK

    def _status(self, rank: int, uid: str = "", clock: int = 0) -> dict[str, Any] | None:
        try:
            status: dict[str, Any] = self.ask(rank, "status", uid, clock)
            return status
        except TimeoutError:
            return _SILENT
        except (EOFError, OSError):
            return None  # that rank is gone

    def _link(self, rank: int) -> Connection:
        if rank not in self._links:
            self._links[rank] = self._connect(rank)
        return self._links[rank]

    def _connect(self, rank: int) -> Connection:
        # the kernel accepts for a process that is stopped, and the handshake takes no timeout
        came: list[Any] = []

        def connect() -> None:
            try:
                came.append(Client(self._addresses[rank], authkey=self._key))
            except Exception as error:
                came.append(error)

        attempt = threading.Thread(target=connect, name="tp-exchange-connect", daemon=True)
        attempt.start()
        attempt.join(UNANSWERED)
        if not came:
            raise TimeoutError(f"no answer in {UNANSWERED:.0f} s")
        if isinstance(came[0], Exception):
            raise came[0]
        link: Connection = came[0]
        return link

    def _accept(self) -> None:
        while not self._closed:
            try:
                link = self._listener.accept()
            except Exception:  # a stranger with a wrong key, or the process ends: neither concerns the peers
                if self._listener._listener is None:  # type: ignore[attr-defined]
                    return
                continue
            threading.Thread(target=self._serve, args=(link,), name="tp-exchange-link", daemon=True).start()
        self._listener.close()

    def _serve(self, link: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                request = link.recv()
                if request[0] in self.services:
                    link.send(self.services[request[0]](*request[1:]))
                else:
                    self._answer(link, self.tensors[request[0]], *request[1:])

    def _show_status(self, uid: str, clock: int) -> dict[str, Any]:
        return {
            "clock": self.sync_points.clock,
            "busy": 0.0 if groups.busy_since is None else time.monotonic() - groups.busy_since,
            "leaving": self.leaving,
            "open": uid in self._open,
            "parked": self.parked,
            "finished": self._finished[uid, clock],
            "failed": self._failed.get((uid, clock)),
        }

    def _answer(self, link: Connection, source: Callable[..., torch.Tensor], *request: Any) -> None:
        try:
            tensor = source(*request).cpu().contiguous()
        except Exception as error:  # told to the asking rank, which raises it
            link.send(("refused", str(error) if isinstance(error, DivergenceError) else repr(error)))
            return
        link.send(("tensor", tensor.dtype, tuple(tensor.shape)))
        flat = _bytes(tensor)
        for at in range(0, len(flat), CHUNK):
            link.send_bytes(flat[at : at + CHUNK])

    def _read_at(self, uid: str, key: str, theirs: object) -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE
        while (source := self._sources.get(uid)) is None or source.fingerprint() != theirs:
            if time.monotonic() > deadline:
                raise DivergenceError(source.apart(theirs) if source else "no such model")
            time.sleep(0.005)
        tensor: torch.Tensor = source.local(key).detach().clone()
        if source.fingerprint() != theirs:
            raise DivergenceError("its weights changed while they were read")
        return tensor


def _sent(error: Exception, rank: int, session: str) -> bytes:
    why = f"rank {rank} failed in {session!r}: {type(error).__name__}: {error}"
    try:
        sent = pickle.dumps((error, why))
        pickle.loads(sent)
        return sent
    except Exception:  # an exception may hold anything
        return pickle.dumps((DivergenceError(why), why))


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


_exchange: PeerTransport | None = None


def exchange(mesh: Mesh) -> PeerTransport:
    """The exchange of this process; collective over the TP group at its first call."""
    global _exchange
    if _exchange is None or _exchange.mesh is not mesh:
        _exchange = PeerTransport(mesh)
        atexit.register(_exchange.farewell)
        mesh.at_end.append(_close)
        hang_report.note_crashes()
    return _exchange


def _close() -> None:
    global _exchange
    if _exchange is not None:
        _exchange.close()
        _exchange = None
