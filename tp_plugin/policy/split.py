"""How a dimension divides over the TP ranks: plain widths, heads, and the fused orders found in HF models.

Every split is a function ``(size, tp, heads) -> Parts`` of the dimension's whole size; a policy may pass its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tp_plugin.errors import PolicyError
from tp_plugin.policy.layout import Parts, Range


@dataclass(frozen=True)
class HeadSplit:
    """Which query heads and which key/value heads each TP rank computes.

    Whole heads only. With ``kv_heads >= tp`` ranks take whole key/value groups (the first ranks one more where tp
    does not divide them). With fewer, each key/value head is replicated on neighbouring ranks, which share its
    query heads; every rank then has one key/value head, so that ``repeat_kv`` stays right.
    """

    q: tuple[Range, ...]
    kv: tuple[Range, ...]

    @staticmethod
    def of(q_heads: int, kv_heads: int, tp: int) -> HeadSplit:
        if q_heads % kv_heads:
            raise PolicyError(f"{q_heads} attention heads are no multiple of {kv_heads} key/value heads")
        if tp > q_heads:
            raise PolicyError(f"tp_size={tp} is larger than the number of attention heads ({q_heads})")
        per_group = q_heads // kv_heads
        if kv_heads >= tp:
            kv = even_ranges(kv_heads, tp)
            return HeadSplit(tuple((a * per_group, b * per_group) for a, b in kv), kv)
        q: list[Range] = []
        groups: list[Range] = []
        for head, (first, last) in enumerate(even_ranges(tp, kv_heads)):
            for a, b in even_ranges(per_group, last - first):
                q.append((head * per_group + a, head * per_group + b))
                groups.append((head, head + 1))
        return HeadSplit(tuple(q), tuple(groups))

    @property
    def q_heads(self) -> int:
        return max(b for _, b in self.q)

    @property
    def kv_heads(self) -> int:
        return max(b for _, b in self.kv)


NO_HEADS = HeadSplit(((0, 1),), ((0, 1),))
"""For splits of what has no heads."""

Split = Callable[[int, int, HeadSplit], Parts]


def even_ranges(size: int, parts: int) -> tuple[Range, ...]:
    """``size`` indices as ``parts`` contiguous ranges whose lengths differ by one at most, longer ones first."""
    base, extra = divmod(size, parts)
    edges = [k * base + min(k, extra) for k in range(parts + 1)]
    return tuple(pairwise(edges))


def even(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Contiguous, as even as whole indices allow (MLP widths)."""
    if tp > size:
        raise PolicyError(f"tp_size={tp} is larger than the width {size} that it should split")
    return tuple((r,) for r in even_ranges(size, tp))


def aligned(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Like :func:`even`, in steps of 8 (4, 2) if the whole is a multiple of that: grouped GEMMs want 16-byte rows."""
    step = math.gcd(size, 8) if size // math.gcd(size, 8) >= tp else 1
    return tuple(tuple(_scale(r, step) for r in part) for part in even(size // step, tp, heads))


def aligned_pairs(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Pairs of indices that stay together: gate and up in turns, ``[g0 u0 g1 u1 …]`` (GPT-OSS)."""
    if size % 2:
        raise PolicyError(f"a dimension of {size} does not divide into pairs of gate and up")
    return tuple(tuple(_scale(r, 2) for r in part) for part in aligned(size // 2, tp, heads))


def q(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Query heads in order: ``[q0 q1 …]``."""
    return tuple((_scale(r, _unit(size, heads.q_heads, "query")),) for r in heads.q)


def kv(size: int, tp: int, heads: HeadSplit) -> Parts:
    """Key or value heads in order: ``[k0 k1 …]``."""
    return tuple((_scale(r, _unit(size, heads.kv_heads, "key/value")),) for r in heads.kv)


def whole(size: int, tp: int, heads: HeadSplit) -> Parts:
    """The same indices on every rank (the single key and value of multi-query attention)."""
    return (((0, size),),) * tp


@dataclass(frozen=True)
class Blocks:
    """Blocks back to back, each split by itself: ``[q|k|v]`` (GPT-2, Phi-3, Falcon-7B) or ``[gate|up]``.

    ``kinds`` are "q", "k", "v" (heads, all of one head size), "even" or "aligned" (blocks of equal width).
    """

    kinds: tuple[str, ...]

    def __call__(self, size: int, tp: int, heads: HeadSplit) -> Parts:
        counts = {"q": heads.q_heads, "k": heads.kv_heads, "v": heads.kv_heads, "even": 1, "aligned": 1}
        unit = _unit(size, sum(counts[kind] for kind in self.kinds), "fused")
        offset, blocks = 0, []
        for kind in self.kinds:
            width = counts[kind] * unit
            split = {"even": even, "aligned": aligned, "q": q}.get(kind, kv)
            blocks.append([tuple(_shift(r, offset) for r in part) for part in split(width, tp, heads)])
            offset += width
        return tuple(tuple(r for part in rank for r in part) for rank in zip(*blocks, strict=True))


@dataclass(frozen=True)
class PerHead:
    """Heads back to back, each with its query, key and value: ``[q0 k0 v0 q1 k1 v1 …]`` (GPT-NeoX, BLOOM)."""

    def __call__(self, size: int, tp: int, heads: HeadSplit) -> Parts:
        if heads.q_heads != heads.kv_heads:
            raise PolicyError(
                f"PerHead needs as many key/value heads ({heads.kv_heads}) as query heads ({heads.q_heads}); "
                "write PerGroup() for grouped queries"
            )
        return q(size, tp, heads)


@dataclass(frozen=True)
class PerGroup:
    """Key/value groups back to back, ``[q q … k v]`` each (Falcon-40B)."""

    def __call__(self, size: int, tp: int, heads: HeadSplit) -> Parts:
        per_group = heads.q_heads // heads.kv_heads
        unit = _unit(size, heads.kv_heads * (per_group + 2), "grouped q/k/v")
        parts = []
        for (q0, q1), (g0, g1) in zip(heads.q, heads.kv, strict=True):
            ranges: list[Range] = []
            for group in range(g0, g1):
                base, first = group * (per_group + 2), group * per_group
                a, b = max(q0, first) - first, min(q1, first + per_group) - first
                ranges += [(base + a, base + b), (base + per_group, base + per_group + 2)]
            parts.append(tuple(_scale(r, unit) for r in ranges))
        return tuple(parts)


def vocabulary_rows(size: int, tp: int) -> tuple[Parts, int]:
    """Contiguous rows, ``ceil(size / tp)`` a rank, the last ranks padded: each rank's range, and the local length."""
    rows = -(-size // tp)
    return tuple(((k * rows, min(size, (k + 1) * rows)),) if k * rows < size else () for k in range(tp)), rows


def _unit(size: int, count: int, what: str) -> int:
    if size % count:
        raise PolicyError(f"a dimension of {size} does not divide into {count} {what} heads")
    return size // count


def _scale(r: Range, unit: int) -> Range:
    return r[0] * unit, r[1] * unit


def _shift(r: Range, offset: int) -> Range:
    return r[0] + offset, r[1] + offset
