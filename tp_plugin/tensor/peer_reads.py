"""What the vocabulary needs of the run around it: agreement before it communicates, and other ranks' columns.

A script may use logits on one rank only, while the other ranks have gone on. So no operation communicates before all
ranks have agreed to; one that is alone reads the other ranks' columns from their threads. How ranks agree and read is
the runtime's business, which hands an object with these methods to every :class:`~.vocab.vocabulary.Vocabulary`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch

Output: TypeAlias = torch.Tensor | Callable[[], torch.Tensor]
"""This rank's columns of a head's output (tokens, width), or what computes them."""

Number = tuple[int, int]
"""Identifies a head's output; equal on all ranks of the TP group for the output of the same call."""


class Held:
    """A head's output on this rank, for as long as a script may read it here or on another rank.

    Attributes:
        number: what the other ranks ask for it by.
        data: this rank's columns.
        ready: on a device, the event after which ``data`` can be read.

    Args:
        device: where the columns are.
        release: called with the number and ``(data, ready)`` when this object is dropped. Another rank may be behind
            and still read what is gone here, so the data is kept until all ranks have met in a collective.
    """

    def __init__(self, number: Number, data: Output, device: torch.device, release: Callable[[Number, Any], None]):
        self.number, self.data = number, data
        self.ready: torch.Event | None = None
        if device.type != "cpu":
            self.ready = torch.Event(device)
            self.ready.record()
        weakref.finalize(self, release, number, (data, self.ready)).atexit = False


class PeerReads(Protocol):
    """The runtime's side. ``copy.deepcopy`` returns the same object: the hooks of a copied model share it."""

    @property
    def wants_full(self) -> bool:
        """Whether logits are to be gathered at once, because the ranks will not meet again before they are read."""

    @property
    def steps(self) -> int:
        """Optimizer steps of this process so far: some of them change weights without counting in-place versions."""

    @property
    def in_forward(self) -> bool:
        """Whether this rank is inside a forward that all ranks of the group entered together."""

    def propose(self, operation: str, newest: Number | None) -> bool:
        """Whether all ranks of the group are at ``operation`` now, so that it may communicate.

        Args:
            operation: describes the operation and its operands; equal on two ranks exactly if they compute the same.
            newest: the last made of the heads' outputs that it reads, None if it reads none. A rank that has not made
                it yet is still in that forward, and is waited for.
        """

    def read(self, rank: int, number: Number, device: torch.device) -> torch.Tensor:
        """The head's output ``number`` of TP rank ``rank``, (tokens, width), on ``device``.

        Raises:
            DivergenceError: that rank has left, or has dropped it and gone on.
        """

    def hold(self, data: Output, device: torch.device) -> Held:
        """Register a head's output on ``device``, so that other ranks may read it while the result is alive."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PeerReads: ...
