"""A TP group without other ranks and without a process group: its collectives give tensors of the right shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.mesh.groups import CommContext, Group, Pending
from tp_plugin.tensor.peer_reads import Held, Number, Output


class ShapeGroup(Group):
    """Rank 0 of ``size`` ranks.

    Attributes:
        sent: (operation, bytes that a rank puts in) → how many.
    """

    def __init__(self, size: int):
        self.role, self.ranks, self.pg = "tp", tuple(range(size)), None
        self.context, self.size, self.rank = CommContext(), size, 0
        self.traced_name = "shapes"
        self.sent: Counter[tuple[str, int]] = Counter()

    def _book(self, op: str, tensor: torch.Tensor) -> None:
        if self.size > 1:
            self.sent[op, tensor.numel() * tensor.element_size()] += 1

    def all_reduce(self, tensor: torch.Tensor, op: Any = None) -> torch.Tensor:
        self._book("all_reduce", tensor)
        return tensor

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return tensor[None]
        self._book("all_gather", tensor)
        return tensor.new_empty(self.size, *tensor.shape)

    def reduce_scatter(self, chunks: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return chunks[0]
        self._book("reduce_scatter", chunks)
        return torch.empty_like(chunks[0])

    def start_all_reduce(self, tensor: torch.Tensor) -> Pending:
        return Pending(self.all_reduce(tensor))

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        return Pending(self.gathered(tensor))

    def start_reduce_scatter(self, chunks: torch.Tensor) -> Pending:
        return Pending(self.reduce_scatter(chunks))

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return tensor


class NoPeers:
    """What the split vocabulary asks of a run (:class:`~tp_plugin.tensor.peer_reads.PeerReads`): all ranks agree."""

    wants_full, steps, in_forward = False, 0, True

    def propose(self, operation: str, newest: Number | None) -> bool:
        return True

    def read(self, rank: int, number: Number, device: torch.device) -> torch.Tensor:
        raise NotImplementedError("no other rank is there to be read")

    def hold(self, data: Output, device: torch.device) -> Held:
        release: Callable[[Number, Any], None] = lambda number, held: None  # noqa: E731
        return Held((0, 0), data, torch.device("cpu"), release)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoPeers:
        return self
