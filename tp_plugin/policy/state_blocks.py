"""Optimizer states that are kept in codes: where their scales lie, one for each block of a tensor's flat elements.

A rank cuts blocks of its own shard. They are blocks of the whole tensor where each range that it holds begins and ends
between two of them, in the whole tensor and in the shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.packed import FlatLayout


def scales_layout(layout: ParamLayout, block: int) -> FlatLayout | None:
    """How the scales of the whole tensor's blocks lie; None where a rank's blocks are others."""
    dim = layout.dim
    assert dim is not None
    outer, size, inner = math.prod(layout.shape[:dim]), layout.shape[dim], math.prod(layout.shape[dim + 1 :])
    for rank, part in enumerate(layout.parts):
        local = layout.local_shape(rank)[dim]
        edges = [] if outer == 1 else [size, local]
        for (start, stop), (mine, end) in zip(part, layout.local_ranges(rank), strict=True):
            is_last = outer == 1 and (stop, end) == (size, local)  # whose last block may be shorter
            edges += [start, mine] if is_last else [start, mine, stop]
        if any(edge * inner % block for edge in edges):
            return None
    parts = tuple(tuple((a * inner // block, -(-b * inner // block)) for a, b in part) for part in layout.parts)
    pad_to = None if layout.pad_to is None else -(-layout.pad_to * inner // block)
    blocks = -(-size * inner // block)
    return FlatLayout.of((outer * blocks,), ParamLayout((outer, blocks), 1, parts, pad_to, layout.absent))


def one_after_another(sizes: Iterable[int]) -> FlatLayout:
    """The layout of what all ranks hold, so many elements each, in the order of the ranks."""
    edges = list(itertools.accumulate(sizes, initial=0))
    parts = tuple(((a, b),) if a < b else () for a, b in itertools.pairwise(edges))
    return FlatLayout.of((edges[-1],), ParamLayout((edges[-1],), 0, parts))


def replicas_agree(layout: ParamLayout) -> bool:
    """Whether ranks that hold the same elements hold the same others beside them, so that their blocks are the same."""
    return all(layout.parts[rank] == layout.parts[ranks[0]] for ranks in layout.replica_groups for rank in ranks)
