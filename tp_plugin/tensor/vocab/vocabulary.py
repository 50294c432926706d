"""Which entries of a split vocabulary each rank holds, and through what the ranks communicate about them."""

from __future__ import annotations

from dataclasses import dataclass

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor.peer_reads import PeerReads

Columns = tuple[int, int]
"""Vocabulary entries ``[start, stop)``."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of ``size`` entries of which each rank of the TP group ``group`` has ``width`` columns.

    What the last ranks have beyond ``size`` is padding. A copied model shares its original's ``group`` and ``peers``.
    """

    size: int
    width: int
    group: Group
    peers: PeerReads

    def owned(self, rank: int) -> Columns:
        """The entries of TP rank ``rank``, without padding; an empty range if it has only padding."""
        return min(rank * self.width, self.size), min((rank + 1) * self.width, self.size)

    @property
    def mine(self) -> Columns:
        """The entries of this rank."""
        return self.owned(self.group.rank)
