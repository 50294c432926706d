"""One record says how a parameter is laid out over the ranks of a unit; slicing, gathering, norms, sums derive from it.

A plan lays parameters over the TP ranks of one stage; :meth:`ParamLayout.on_stages` makes of that what all ranks of a
unit hold, which is the same thing where there is one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

Range = tuple[int, int]
"""Half-open interval ``[start, stop)`` of indices."""

Parts = tuple[tuple[Range, ...], ...]
"""For each TP rank, the ranges of the whole dimension that it holds, in local order."""


@dataclass(frozen=True)
class ParamLayout:
    """How one whole tensor of ``shape`` lies on some ranks.

    ``dim`` is the split dimension (None: every rank holds the whole tensor). ``parts[rank]`` lists the ranges of
    ``dim`` that the rank holds, in the order in which they lie there; ranges on several ranks are replicas.
    ``pad_to`` is a local length to which every rank is filled with zeros (vocabulary rows). ``absent`` ranks, which are
    of other pipeline stages, hold no element, nor padding.

    whole dim:   |  q0 q1 q2 q3  |  k0 k1  |      parts = (((0, 2), (4, 5)),      rank 0: q0 q1 k0
    4 ranges of two fused blocks, tp = 2:                  ((2, 4), (5, 6)))      rank 1: q2 q3 k1
    """

    shape: tuple[int, ...]
    dim: int | None
    parts: Parts
    pad_to: int | None = None
    absent: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        size = self.shape[self.dim]
        held = sorted({r for part in self.parts for r in part})
        if any(not 0 <= a < b <= size for a, b in held):
            raise ValueError(f"layout of {self.shape}: a range of {held} lies outside dimension {self.dim}")
        reach = 0
        for start, stop in held:
            if start > reach:
                break
            reach = max(reach, stop)
        if reach != size:
            raise ValueError(f"layout of {self.shape}: indices from {reach} of dimension {self.dim} are on no rank")
        if self.pad_to is not None and any(_length(part) > self.pad_to for part in self.parts):
            raise ValueError(f"layout of {self.shape}: a rank holds more than pad_to={self.pad_to}")

    @staticmethod
    def replicated(shape: Sequence[int], tp: int) -> ParamLayout:
        """The layout in which each of ``tp`` ranks holds the whole tensor."""
        return ParamLayout(tuple(shape), None, ((),) * tp)

    def on_stages(self, stages: Sequence[int], count: int) -> ParamLayout:
        """The layout over the ranks of a unit of ``count`` stages, of a tensor that lies so on these ``stages``.

        Rank ``s * tp + t`` of the unit is TP rank ``t`` of stage ``s``.
        """
        everywhere = tuple(stages) == tuple(range(count))
        if everywhere and (count == 1 or self.dim is None):
            return self if count == 1 else ParamLayout.replicated(self.shape, self.ranks * count)
        if not self.shape:
            raise ValueError("a single number cannot lie on some stages only")
        dim = self.dim or 0
        parts = (((0, self.shape[0]),),) * self.ranks if self.dim is None else self.parts
        nothing: Parts = ((),) * self.ranks
        held: Parts = ()
        for stage in range(count):
            held += parts if stage in stages else nothing
        absent = tuple(at for at in range(len(held)) if at // self.ranks not in stages)
        return ParamLayout(self.shape, dim, held, self.pad_to, absent)

    @property
    def ranks(self) -> int:
        """On how many ranks it lies."""
        return len(self.parts)

    @property
    def is_sharded(self) -> bool:
        return self.dim is not None

    @property
    def features(self) -> ParamLayout:
        """How the matrix is cut that a layer computes with: itself, if the tensor is no code for one (packed.py)."""
        return self

    @cached_property
    def segments(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """``(start, stop, ranks)`` for each maximal stretch of the split dimension held by one set of ranks."""
        cuts = sorted({edge for part in self.parts for r in part for edge in r})
        return tuple(
            (start, stop, tuple(k for k, part in enumerate(self.parts) if any(a <= start < b for a, b in part)))
            for start, stop in pairwise(cuts)
        )

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the tensor that ``rank`` holds, padding included."""
        if self.dim is None:
            return self.shape
        length = _length(self.parts[rank]) if self.pad_to is None or rank in self.absent else self.pad_to
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def local_numel(self, rank: int) -> int:
        """Number of elements that ``rank`` holds, padding included."""
        return torch.Size(self.local_shape(rank)).numel()

    def shard(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The shard of ``whole`` (of ``shape``) that ``rank`` holds, as a tensor of its own (same dtype and device)."""
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"expected a tensor of shape {self.shape}, got {tuple(whole.shape)}")
        if self.dim is None:
            return whole
        pieces = [whole.narrow(self.dim, a, b - a) for a, b in self.parts[rank]]
        missing = self.local_shape(rank)[self.dim] - _length(self.parts[rank])
        if missing:
            pieces.append(whole.new_zeros((*self.shape[: self.dim], missing, *self.shape[self.dim + 1 :])))
        if not pieces:
            return whole.new_empty(self.local_shape(rank))
        # cat copies even a single piece: a view would keep the whole tensor alive
        return torch.cat(pieces, self.dim)

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the tensors of all ranks, in rank order; the inverse of :meth:`shard`."""
        if self.dim is None:
            return shards[0]
        whole = shards[0].new_empty(self.shape)
        for rank, shard in enumerate(shards):
            self.place(whole, shard, rank)
        return whole

    def place(self, whole: torch.Tensor, shard: torch.Tensor, rank: int) -> None:
        """Write what ``rank`` holds into its place in ``whole``; padding is dropped."""
        if self.dim is None:
            whole.copy_(shard)
            return
        for (a, b), (start, _) in zip(self.parts[rank], self.local_ranges(rank), strict=True):
            whole.narrow(self.dim, a, b - a).copy_(shard.narrow(self.dim, start, b - a))

    @cached_property
    def whole_on(self) -> tuple[int, ...]:
        """The ranks that hold the whole tensor; none if others hold a part of it."""
        holders = tuple(rank for rank in range(self.ranks) if rank not in self.absent and self.local_numel(rank))
        return holders if all(self.local_shape(rank) == self.shape for rank in holders) else ()

    def local_ranges(self, rank: int) -> tuple[Range, ...]:
        """Where each range of ``parts[rank]`` lies in the local tensor."""
        ranges, at = [], 0
        for a, b in self.parts[rank]:
            ranges.append((at, at + b - a))
            at += b - a
        return tuple(ranges)

    def to_local(self, rank: int, start: int, stop: int) -> Range:
        """Where ``rank`` holds the range ``[start, stop)`` of the whole dimension, which lies in one of its ranges."""
        for (a, b), (at, _) in zip(self.parts[rank], self.local_ranges(rank), strict=True):
            if a <= start and stop <= b:
                return at + start - a, at + stop - a
        raise ValueError(f"rank {rank} does not hold [{start}, {stop})")

    def owned(self, rank: int) -> tuple[Range, ...]:
        """Local ranges that count for ``rank`` when every element must count once: the first holder owns it."""
        return self._owned[rank]

    @cached_property
    def _owned(self) -> tuple[tuple[Range, ...], ...]:
        return tuple(
            _merge([self.to_local(rank, a, b) for a, b, ranks in self.segments if ranks[0] == rank])
            for rank in range(self.ranks)
        )

    @cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The distinct sets of more than one rank that hold the same elements of a sharded tensor, sorted."""
        if self.dim is None:
            return ()
        return tuple(sorted({ranks for _, _, ranks in self.segments if len(ranks) > 1}))

    def replicated_in(self, rank: int, group: tuple[int, ...]) -> tuple[Range, ...]:
        """Local ranges of ``rank`` whose replicas are exactly the ranks of ``group``, in whole-tensor order."""
        return tuple(self.to_local(rank, a, b) for a, b, ranks in self.segments if ranks == group)

    def is_alike_on(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks hold the same elements in the same order."""
        return self.dim is None or len({self.parts[rank] for rank in ranks}) == 1

    def replica_count(self, rank: int) -> int:
        """On how many ranks the most replicated element of ``rank`` lies."""
        if self.dim is None:
            return self.ranks
        return max((len(ranks) for _, _, ranks in self.segments if rank in ranks), default=1)


def reshard(shards: Sequence[torch.Tensor], source: ParamLayout, target: ParamLayout, rank: int) -> torch.Tensor:
    """What ``rank`` holds under ``target``, from the tensors of all ranks under ``source``."""
    return target.shard(source.gather(shards), rank)


def _length(ranges: Sequence[Range]) -> int:
    return sum(b - a for a, b in ranges)


def _merge(ranges: Sequence[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for a, b in sorted(ranges):
        if merged and merged[-1][1] == a:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return tuple(merged)
