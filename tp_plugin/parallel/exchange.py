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
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.errors import DivergenceError
from tp_plugin.parallel import mesh as groups
from tp_plugin.parallel.lockstep import END, Lockstep
from tp_plugin.parallel.mesh import Mesh

PATIENCE = float(os.environ.get("TP_PLUGIN_READ_TIMEOUT", "30"))
"""Seconds that a read waits for a peer to reach the same point of the program."""

GRACE = 5.0
"""Seconds that a reader stays for a peer of which nothing shows whether it will make the same call."""

STUCK = 20.0
"""Seconds in one collective after which a rank is taken to wait for one that has come to its end."""


class Source(Protocol):
    """Something whose local tensors other ranks may read."""

    def fingerprint(self) -> object:
        """A value that is equal on two ranks exactly when their weights are at the same point of the program."""

    def local(self, key: str) -> torch.Tensor:
        """This rank's tensor of that name."""

    def alive(self) -> bool:
        """Whether the script still holds what the tensors belong to."""

    def keep(self) -> None:
        """Hold the tensors themselves from now on, so that they outlive their owner."""


class Exchange:
    """This rank's server and its connections to the other ranks of the TP group."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.lockstep = Lockstep(mesh, self._census, self._bury, self._find)
        self.leaving = False
        self._pid = os.getpid()
        self._sources: dict[str, Any] = {}
        self._order: list[str] = []
        self._open: set[str] = set()
        self._parked = ""
        self._finished: Counter[tuple[str, int]] = Counter()
        self._links: dict[int, Connection] = {}
        self._asking = threading.Lock()
        self._key = mesh.control.broadcast_object(secrets.token_bytes(32) if mesh.is_leader else None)
        hosts = mesh.control.gather_objects(socket.gethostname())
        host = "127.0.0.1" if len(set(hosts)) == 1 else _address()
        self._listener = Listener((host, 0), backlog=mesh.tp_size, authkey=self._key)
        self._addresses = mesh.control.gather_objects(self._listener.address)
        threading.Thread(target=self._accept, name="tp-exchange", daemon=True).start()

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
            link = self._link(rank)
            link.send(("read", uid, key, self._sources[uid].fingerprint()))
            if not link.poll(PATIENCE + 30):
                raise DivergenceError(f"cannot read {key!r}: TP rank {rank} gives no answer")
            answer = link.recv()
            if answer[0] != "tensor":
                raise DivergenceError(
                    f"cannot read {key!r} from TP rank {rank}: {answer[1]}. Call the saving function at the same place "
                    "on every rank, before anything changes the weights"
                )
            dtype, shape = answer[1], answer[2]
            raw = link.recv_bytes()
        except (EOFError, OSError) as error:
            reason = error or "connection closed"
            raise DivergenceError(f"cannot read {key!r}: TP rank {rank} has left ({reason})") from error
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(shape)

    @contextlib.contextmanager
    def together(self, session: str) -> Iterator[None]:
        """A call that ranks leave together: a peer that does nothing in it returns when the leader's part is done."""
        self.enter(session)
        try:
            yield
        finally:
            self.leave(session)

    def enter(self, session: str) -> None:
        """This rank begins a call in which shards are read, here or on another rank."""
        self._open.add(session)

    def leave(self, session: str) -> None:
        """Stay until every rank that made the same call has finished it; ranks elsewhere are not waited for."""
        at = (session, self.lockstep.clock)
        self._finished[at] += 1
        self._open.discard(session)
        self._parked = session
        patience = time.monotonic() + GRACE
        waiting = [rank for rank in range(self.mesh.tp_size) if rank != self.mesh.tp.rank]
        while waiting:
            waiting = [rank for rank in waiting if not self._is_through(rank, at, time.monotonic() > patience)]
            if waiting:
                time.sleep(0.005)
        self._parked = ""

    def _is_through(self, rank: int, at: tuple[str, int], impatient: bool) -> bool:
        status = self._status(rank, *at)
        if status is None or status["leaving"] or status["clock"] > self.lockstep.clock:
            return True
        if status["parked"] in self._open:
            return True  # it waits for this rank in an outer call, of which this one is a part
        return bool(status["finished"] >= self._finished[at] or (impatient and not status["open"]))

    def farewell(self) -> None:
        """At exit: the ranks leave together, so that one which only saves or evaluates a last time finds its peers.

        Peers help with the leader's last forwards and are read meanwhile (after ``destroy_process_group``: only read).
        Who waits in vain is not waited for: a rank that is stuck in a collective because this one came to its end.
        """
        if _crashed or os.getpid() != self._pid:
            return  # what others wait for will not come, or this is a fork of the rank
        self.leaving = True
        meeting = threading.Thread(target=self._meet_at_the_end, daemon=True)
        meeting.start()
        others = [rank for rank in range(self.mesh.tp_size) if rank != self.mesh.tp.rank]
        while meeting.is_alive():
            meeting.join(timeout=0.05)
            stuck = [rank for rank in others if not self.lockstep.helping and self._is_stuck(rank)]
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
                self.lockstep.meet(END)
            return
        while not self.mesh.is_leader and (status := self._status(0)) and not status["leaving"]:
            time.sleep(0.05)

    def _is_stuck(self, rank: int) -> bool:
        status = self._status(rank)
        return status is not None and not status["leaving"] and status["busy"] > STUCK

    def _status(self, rank: int, uid: str = "", clock: int = 0) -> dict[str, Any] | None:
        try:
            with self._asking:
                link = self._link(rank)
                link.send(("status", uid, clock))
                status: dict[str, Any] = link.recv()
                return status
        except (EOFError, OSError):
            return None  # that rank is gone

    def _link(self, rank: int) -> Connection:
        if rank not in self._links:
            self._links[rank] = Client(self._addresses[rank], authkey=self._key)
        return self._links[rank]

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except Exception:  # a stranger with a wrong key, or the process ends: neither concerns the peers
                if self._listener._listener is None:  # type: ignore[attr-defined]
                    return
                continue
            threading.Thread(target=self._serve, args=(link,), name="tp-exchange-link", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                request = link.recv()
                if request[0] == "status":
                    _, uid, clock = request
                    link.send(
                        {
                            "clock": self.lockstep.clock,
                            "busy": 0.0 if groups.busy_since is None else time.monotonic() - groups.busy_since,
                            "leaving": self.leaving,
                            "open": uid in self._open,
                            "parked": self._parked,
                            "finished": self._finished[uid, clock],
                        }
                    )
                else:
                    self._answer(link, *request[1:])

    def _answer(self, link: Connection, uid: str, key: str, theirs: object) -> None:
        try:
            tensor = self._read_at(uid, key, theirs).cpu().contiguous()
        except Exception as error:  # told to the asking rank, which raises it
            link.send(("refused", str(error) if isinstance(error, DivergenceError) else repr(error)))
            return
        link.send(("tensor", tensor.dtype, tuple(tensor.shape)))
        link.send_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def _read_at(self, uid: str, key: str, theirs: object) -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE
        while (source := self._sources.get(uid)) is None or source.fingerprint() != theirs:
            if time.monotonic() > deadline:
                raise DivergenceError("its weights are at another point of the program" if source else "no such model")
            time.sleep(0.005)
        tensor: torch.Tensor = source.local(key).detach().clone()
        if source.fingerprint() != theirs:
            raise DivergenceError("its weights changed while they were read")
        return tensor


def _address() -> str:
    """This host's address as the others see it: the one from which it reaches the rendezvous (no packet is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))))
        return str(probe.getsockname()[0])


_exchange: Exchange | None = None
_crashed = False


def exchange(mesh: Mesh) -> Exchange:
    """The exchange of this process; collective over the TP group at its first call."""
    global _exchange
    if _exchange is None or _exchange.mesh is not mesh:
        _exchange = Exchange(mesh)
        atexit.register(_exchange.farewell)
        _note_crashes()
    return _exchange


def _note_crashes() -> None:
    # a rank that died of an exception must not wait at exit: its peers may be waiting for it in a collective
    previous = sys.excepthook

    def note(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        global _crashed
        _crashed = True
        previous(kind, value, trace)

    sys.excepthook = note
