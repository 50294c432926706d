"""Shards gathered by collectives while the ranks of a unit are in one call, such as a save.

A peer that has nothing left to do in the call waits for the leader at its end (sessions.py). While it waits, its main
thread is free for a collective: the leader asks all peers for the same shard, and gathers them on the device. Between
two shards nobody is in a collective, however long the leader writes. A peer that did not come to the call is read by
the transport, as usual.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.published import PublishedTensors
from tp_plugin.runtime.sessions import Sessions
from tp_plugin.runtime.transport import PeerTransport

TOGETHER = 1.0
"""Seconds that the leader gives its peers to come to the end of a call, once in each."""


class JointReads:
    """This rank's part in such reads."""

    def __init__(self, mesh: Mesh, transport: PeerTransport, published: PublishedTensors, sessions: Sessions):
        self._mesh, self._transport, self._published, self._sessions = mesh, transport, published, sessions
        self._asked: deque[tuple[str, str, int]] = deque()
        self._agreed: object = None
        self._waited_in = -1
        transport.serve("may gather", self._may_gather)
        transport.serve("gather", self._queue)
        sessions.while_parked = self._give

    def read(self, uid: str, key: str, local: torch.Tensor, layout: ParamLayout) -> list[torch.Tensor] | None:
        """The shards of all ranks in host memory; None if this rank is not the leader, or some peer is elsewhere."""
        calls = self._sessions.together_in()
        if not calls or not self._mesh.is_leader or threading.current_thread() is not threading.main_thread():
            return None
        clock = self._published.clock_of(uid)
        length = max(layout.local_numel(rank) for rank in range(layout.ranks))
        group, peers = self._mesh.unit_for(local), self._sessions.peers()
        try:
            agreed = self._sessions.entered, uid, clock
            if self._agreed != agreed:
                if not self._have_come(calls):
                    return None
                if not all(self._transport.ask(rank, "may gather", calls, uid, clock) for rank in peers):
                    return None
                self._agreed = agreed
            sent = _flat(local, length)
            into = [torch.empty_like(sent) for _ in range(group.size)]
        except (torch.OutOfMemoryError, EOFError, OSError):
            return None
        for rank in peers:
            self._ask_for(rank, uid, key, length)
        shards = _to_host(group.gather(sent, into))
        return [flat[: layout.local_numel(rank)].view(layout.local_shape(rank)) for rank, flat in enumerate(shards)]

    def _ask_for(self, rank: int, uid: str, key: str, length: int) -> None:
        try:
            self._transport.ask(rank, "gather", uid, key, length)
        except (EOFError, OSError) as error:  # the others are in the collective by now: there is no way back
            raise DivergenceError(f"cannot gather {key!r}: TP rank {rank} has left ({error})") from error

    def _have_come(self, calls: list[str]) -> bool:
        """Whether all peers wait at the end of one of ``calls``; they stay there until this rank has come to it."""
        patience = time.monotonic() + TOGETHER * (self._waited_in != self._sessions.outermost)
        self._waited_in = self._sessions.outermost
        begun = self._mesh.context.stats.unit_collectives
        while True:
            statuses = {rank: self._sessions.status(rank) for rank in self._sessions.peers()}
            away = [rank for rank, status in statuses.items() if status is None or status["parked"] not in calls]
            if not away:
                return True
            beyond = [rank for rank in away if self._transport.ask(rank, "presence", calls[0], begun) == "beyond"]
            if beyond or time.monotonic() > patience:
                return False
            time.sleep(0.002)

    def _may_gather(self, calls: list[str], uid: str, theirs: Any) -> bool:
        return self._sessions.parked in calls and self._published.is_at(uid, theirs)

    def _queue(self, uid: str, key: str, length: int) -> None:
        self._asked.append((uid, key, length))

    def _give(self) -> None:
        while self._asked:
            uid, key, length = self._asked.popleft()
            local = self._published.local(uid, key)
            self._mesh.unit_for(local).gather(_flat(local, length))


def _flat(local: torch.Tensor, length: int) -> torch.Tensor:
    local = local.detach().reshape(-1)
    if len(local) == length:
        return local
    padded = local.new_zeros(length)  # a gather takes equal lengths only
    padded[: len(local)] = local
    return padded


def _to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    if tensors[0].device.type == "cpu":
        return tensors
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.accelerator.synchronize(tensors[0].device)
    return copies
