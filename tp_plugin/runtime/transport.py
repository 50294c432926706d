"""Messages between the ranks of a unit that need nobody's main thread: small answers, and tensors.

Scripts save or evaluate on the main process alone, or on all; they cannot be asked to make all ranks call a collective.
So each rank answers from threads of its own what its parts registered: :meth:`PeerTransport.serve` for small objects,
:meth:`PeerTransport.serve_tensor` for tensors. The transport knows nothing of what is asked.

A peer that connects proves that it knows a key, which the unit's leader drew and sent over torch.distributed; messages
are pickles, so the key is what keeps others out. Every connection has a thread of its own, and a handshake without it
ends after :data:`HANDSHAKE` seconds.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.hosts import Machine, address
from tp_plugin.mesh.roles import Mesh

UNANSWERED = 20.0
"""Seconds that a peer has for a small answer; it cannot give one while its process is stopped or a library holds the
GIL."""

HANDSHAKE = 10.0
"""Seconds that a connecting peer has for each message of the handshake."""

CHUNK = 1 << 20
"""Bytes that are sent at a time: a connection holds what it receives several times over."""


class PeerTransport:
    """This rank's server and its connections to the other ranks of the unit. Collective over the unit when made."""

    def __init__(self, mesh: Mesh):
        self._answers: dict[str, Callable[..., Any]] = {}
        self._tensors: dict[str, Callable[..., torch.Tensor]] = {}
        self._links: dict[int, Connection] = {}
        self._asking = threading.Lock()
        self._closed = False
        self._key: bytes = mesh.unit_cpu.broadcast_object(secrets.token_bytes(32) if mesh.is_leader else None)
        self.machines: list[Machine] = mesh.unit_cpu.gather_objects(Machine.here())
        """Where the ranks of the unit are, in rank order."""
        host = "127.0.0.1" if len(set(self.machines)) == 1 else address(mesh.unit_cpu)
        self._listener = Listener((host, 0), backlog=max(16, mesh.unit.size))
        self._addresses = mesh.unit_cpu.gather_objects(self._listener.address)
        threading.Thread(target=self._accept, name="tp-transport", daemon=True).start()

    def serve(self, name: str, answer: Callable[..., Any]) -> None:
        """Let other ranks :meth:`ask` for ``name``; ``answer(*request)`` runs in a thread of the transport."""
        self._answers[name] = answer

    def serve_tensor(self, name: str, answer: Callable[..., torch.Tensor]) -> None:
        """Let other ranks :meth:`fetch` the tensor ``name``; what ``answer(*request)`` raises is raised there."""
        self._tensors[name] = answer

    def ask(self, rank: int, *request: Any) -> Any:
        """What rank ``rank`` of the unit answers to ``request``: a name, and its arguments.

        Raises:
            EOFError, OSError: the peer is gone.
            TimeoutError: it is there, but does not answer.
        """
        with self._asking:
            link = self._link(rank)
            link.send(request)
            if not link.poll(UNANSWERED):
                del self._links[rank]  # the answer may yet come, and would be taken for the next one's
                raise TimeoutError(f"no answer in {UNANSWERED:.0f} s")
            return link.recv()

    def fetch(self, rank: int, *request: Any, patience: float = 60.0) -> torch.Tensor:
        """The tensor that rank ``rank`` of the unit answers ``request`` with, in host memory.

        Raises:
            DivergenceError: the peer refuses, with its reason, or gives no answer within ``patience`` seconds.
            EOFError, OSError: the peer is gone.
        """
        with self._asking:
            link = self._link(rank)
            link.send(request)
            if not link.poll(patience):
                del self._links[rank]
                raise DivergenceError("it gives no answer")
            answer = link.recv()
            if answer[0] != "tensor":
                raise DivergenceError(answer[1])
            tensor = torch.empty(answer[2], dtype=answer[1], device="cpu")
            into, at = _bytes(tensor), 0
            while at < len(into):
                raw = link.recv_bytes()
                into[at : at + len(raw)] = raw
                at += len(raw)
        return tensor

    def close(self) -> None:
        """Serve nobody any more; ends the threads."""
        self._closed = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.address, timeout=1).close()  # wakes the thread that accepts
        for link in self._links.values():
            link.close()

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

        attempt = threading.Thread(target=connect, name="tp-transport-connect", daemon=True)
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
                link = self._listener.accept()  # without a handshake, which would keep the next one waiting
            except OSError:
                break  # the process ends
            threading.Thread(target=self._serve, args=(link,), name="tp-transport-link", daemon=True).start()
        self._listener.close()

    def _serve(self, link: Connection) -> None:
        if not self._knows_key(link):
            link.close()
            return
        with contextlib.suppress(EOFError, OSError):
            while True:
                request = link.recv()
                if request[0] in self._answers:
                    link.send(self._answers[request[0]](*request[1:]))
                else:
                    self._send_tensor(link, self._tensors[request[0]], *request[1:])

    def _knows_key(self, link: Connection) -> bool:
        try:
            deliver_challenge(_Patient(link), self._key)  # type: ignore[arg-type]
            answer_challenge(_Patient(link), self._key)  # type: ignore[arg-type]
        except Exception:  # a connection with a wrong key or none: the peers need not know
            return False
        return True

    def _send_tensor(self, link: Connection, answer: Callable[..., torch.Tensor], *request: Any) -> None:
        try:
            tensor = answer(*request).cpu().contiguous()
        except Exception as error:  # told to the asking rank, which raises it
            link.send(("refused", str(error) if isinstance(error, DivergenceError) else repr(error)))
            return
        link.send(("tensor", tensor.dtype, tuple(tensor.shape)))
        flat = _bytes(tensor)
        for at in range(0, len(flat), CHUNK):
            link.send_bytes(flat[at : at + CHUNK])

    def __deepcopy__(self, memo: dict[int, Any]) -> PeerTransport:
        return self


class _Patient:
    """A connection whose messages come within :data:`HANDSHAKE` seconds, or not at all."""

    def __init__(self, link: Connection):
        self._link = link

    def send_bytes(self, message: bytes) -> None:
        self._link.send_bytes(message)

    def recv_bytes(self, longest: int) -> bytes:
        if not self._link.poll(HANDSHAKE):
            raise TimeoutError("no handshake")
        return self._link.recv_bytes(longest)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat
