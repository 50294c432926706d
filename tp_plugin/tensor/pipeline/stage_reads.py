"""How a stage's ranks agree on their logits, which live inside of the pipeline's forward and backward only."""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.tensor.peer_reads import Held, Number, Output, PeerReads


class StageReads:
    """A :class:`PeerReads`: in the pipeline's forward and backward the ranks of a stage are always at one operation."""

    wants_full = False
    in_forward = True

    def __init__(self, peers: PeerReads):
        self._peers = peers

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._peers.steps

    def propose(self, operation: str, newest: Number | None) -> bool:
        """True."""
        return True

    def hold(self, data: Output, device: torch.device) -> Held:
        """Register a head's output."""
        return self._peers.hold(data, device)

    def read(self, rank: int, number: Number, device: torch.device) -> torch.Tensor:
        """Never asked for, as no rank is alone."""
        raise AssertionError("a rank of a pipeline stage was alone at its logits")

    def __deepcopy__(self, memo: dict[int, Any]) -> StageReads:
        return self
