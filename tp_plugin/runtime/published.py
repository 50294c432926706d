"""One-sided reads: a rank fetches its peers' shards whenever the script asks for full tensors.

What keeps this exact: a read is answered only when both ranks' weights are of one step (:meth:`Source.is_at`). A peer
that lags is waited for; a peer that has moved on is an error on the reader.
"""

from __future__ import annotations

import functools
import operator
import os
import time
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.config.keys import ENV_READ_TIMEOUT
from tp_plugin.errors import DivergenceError
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.transport import PeerTransport

PATIENCE = float(os.environ.get(ENV_READ_TIMEOUT, "30"))
"""Seconds that a read waits for a peer to reach the same step."""

ELSEWHERE = "its weights are at another point of the program"

MOST = 62
"""Sources whose end is reported at once, in the bits of an integer."""

LiveReport = tuple[int, int]
"""How many sources a rank has published, and a bit mask of those whose owner is gone."""


class Source(Protocol):
    """Something whose local tensors other ranks may read."""

    def clock(self) -> object:
        """When in the program this rank's tensors are, for :meth:`is_at` of another rank."""

    def is_at(self, theirs: Any) -> bool:
        """Whether this rank's tensors are of the same step as those of a rank whose clock is ``theirs``."""

    def explain_mismatch(self, theirs: Any) -> str:
        """What is the matter with these tensors, if they are not."""

    def local(self, key: str) -> torch.Tensor:
        """This rank's tensor of that name."""

    def alive(self) -> bool:
        """Whether the script still holds what the tensors belong to."""

    def retain(self) -> None:
        """Hold the tensors themselves from now on, so that they outlive their owner."""


class PublishedTensors:
    """What other ranks may read here, and the reading of theirs."""

    def __init__(self, transport: PeerTransport, progress: Progress):
        self._transport, self._progress = transport, progress
        self._sources: dict[str, Any] = {}
        self._order: list[str] = []
        transport.serve_tensor("read", self._answer)

    def publish(self, uid: str, source: Source) -> None:
        """Let other ranks read ``source`` under ``uid`` (the same on all ranks) for as long as any rank may ask.

        A peer's script may drop a model, or return from its main function, while the leader still saves it. So the
        source is kept, and released at a later sync point, once its owner is gone on every rank.
        """
        self._sources[uid] = source
        self._order.append(uid)

    def read(self, uid: str, key: str, rank: int) -> torch.Tensor:
        """The tensor ``key`` of ``uid`` on rank ``rank`` of the unit, in host memory.

        Raises:
            DivergenceError: the peer is gone, or its weights did not come to this rank's step within PATIENCE.
        """
        try:
            return self._transport.fetch(rank, "read", uid, key, self._sources[uid].clock(), patience=PATIENCE + 30)
        except DivergenceError as error:
            raise DivergenceError(
                f"cannot read {key!r} from TP rank {rank}: {error}. Call the saving function at the same place "
                "on every rank, before anything changes the weights"
            ) from error
        except (EOFError, OSError) as error:
            reason = error or "connection closed"
            raise DivergenceError(f"cannot read {key!r}: TP rank {rank} has left ({reason})") from error

    def clock_of(self, uid: str) -> object:
        """When in the program this rank's tensors of ``uid`` are."""
        return self._sources[uid].clock()

    def is_at(self, uid: str, theirs: object) -> bool:
        """Whether they are of the same step as those of a rank whose clock is ``theirs``."""
        return uid in self._sources and bool(self._sources[uid].is_at(theirs))

    def local(self, uid: str, key: str) -> torch.Tensor:
        """This rank's tensor ``key`` of ``uid``."""
        tensor: torch.Tensor = self._sources[uid].local(key)
        return tensor

    def report_live(self) -> LiveReport:
        """What this rank tells the others of its sources at a sync point."""
        gone = 0
        for bit, uid in enumerate(self._order[:MOST]):
            self._sources[uid].retain()
            gone |= (not self._sources[uid].alive()) << bit
        return len(self._order), gone

    def release_dead(self, everyone: list[LiveReport]) -> None:
        """Let go of sources whose owner is gone on every rank."""
        counts, masks = zip(*everyone, strict=True)
        if len(set(counts)) > 1:
            return  # the ranks published different things; which bit is which cannot be told
        gone = functools.reduce(operator.and_, masks)
        for uid in [uid for bit, uid in enumerate(self._order[:MOST]) if gone >> bit & 1]:
            self._order.remove(uid)
            del self._sources[uid]

    def model(self, number: int) -> nn.Module:
        """The sharded model of a number, as this rank has it."""
        found = [source for source in self._sources.values() if getattr(source, "number", None) == number]
        module: nn.Module = found[0].module()
        return module

    def _answer(self, uid: str, key: str, theirs: Any) -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE
        while (source := self._sources.get(uid)) is None or not source.is_at(theirs):
            if time.monotonic() > deadline:
                raise DivergenceError(source.explain_mismatch(theirs) if source else "no such model")
            time.sleep(0.005)
        tensor = self._progress.to_host(source.local(key))
        if not source.is_at(theirs):
            raise DivergenceError("its weights changed while they were read")
        return tensor
