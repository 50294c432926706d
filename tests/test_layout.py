"""The record of how a tensor lies on ranks: every layout found in HF models, any legal tp, and its inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_plugin.errors import PolicyError
from tp_plugin.policy import Blocks, HeadSplit, ParamLayout, PerGroup, PerHead, even, kv, q, reshard, whole
from tp_plugin.policy.layout import Parts
from tp_plugin.policy.split import vocabulary_rows


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(query heads, key/value heads, tp) that may be split."""
    kv_heads = draw(st.integers(1, 6))
    q_heads = kv_heads * draw(st.integers(1, 4))
    return q_heads, kv_heads, draw(st.integers(1, min(8, q_heads)))


def codegen(size: int, tp: int, heads: HeadSplit) -> Parts:
    """CodeGen's order: four blocks of [q v k], each with a quarter of the heads; tp must divide 4."""
    unit = size // (3 * heads.q_heads)
    quarter = heads.q_heads // 4
    parts = []
    for first, last in heads.q:
        ranges = []
        for block in range(4):
            a, b = max(first, block * quarter), min(last, (block + 1) * quarter)
            for kind in range(3) if a < b else ():
                base = block * 3 * quarter + kind * quarter - block * quarter
                ranges.append(((base + a) * unit, (base + b) * unit))
        parts.append(tuple(ranges))
    return tuple(parts)


@st.composite
def layouts(draw: st.DrawFn, tp: int | None = None, counts: tuple[int, int] | None = None) -> ParamLayout:
    q_heads, kv_heads, drawn_tp = draw(head_counts()) if counts is None else (*counts, 1)
    tp = tp or drawn_tp
    return _layout(draw(st.sampled_from(sorted(KINDS))), q_heads, kv_heads, tp)


def _layout(kind: str, q_heads: int, kv_heads: int, tp: int, unit: int = 3) -> ParamLayout:
    heads = HeadSplit.of(q_heads, kv_heads, tp)
    shape, dim, split = KINDS[kind](q_heads, kv_heads, unit)
    if kind == "vocabulary":
        parts, rows = vocabulary_rows(shape[0], tp)
        return ParamLayout(shape, 0, parts, pad_to=rows)
    if split is None:
        return ParamLayout.replicated(shape, tp)
    return ParamLayout(shape, dim, split(shape[dim], tp, heads))


KINDS = {
    "rows of q": lambda n, g, u: ((n * u, 5), 0, q),
    "columns of o_proj": lambda n, g, u: ((5, n * u), 1, q),
    "rows of k": lambda n, g, u: ((g * u, 5), 0, kv),
    "Conv1D qkv": lambda n, g, u: ((5, (n + 2 * g) * u), 1, Blocks(("q", "k", "v"))),
    "bias of qkv": lambda n, g, u: (((n + 2 * g) * u,), 0, Blocks(("q", "k", "v"))),
    "per head": lambda n, g, u: ((3 * n * u, 5), 0, lambda s, tp, h: PerHead()(s, tp, HeadSplit(h.q, h.q))),
    "per group": lambda n, g, u: (((n + 2 * g) * u, 5), 0, PerGroup()),
    "gate|up": lambda n, g, u: ((2 * (8 + n), 5), 0, Blocks(("even", "even"))),
    "experts, fused gate|up": lambda n, g, u: ((3, 5, 2 * (8 + n)), 2, Blocks(("even", "even"))),
    "experts by expert": lambda n, g, u: ((8 + n, 5, 4), 0, even),
    "relative position bias per head": lambda n, g, u: ((7, n), 1, q),
    "the one key of multi-query": lambda n, g, u: ((2 * u, 5), 0, whole),
    "vocabulary": lambda n, g, u: ((17 * n + g, 4), 0, None),
    "replicated": lambda n, g, u: ((n, 4), None, None),
}


def numbered(layout: ParamLayout) -> torch.Tensor:
    size = torch.Size(layout.shape).numel()
    return torch.arange(1, size + 1).reshape(layout.shape)


@given(layouts())
def test_gather_undoes_shard(layout: ParamLayout) -> None:
    tensor = numbered(layout)
    shards = [layout.shard(tensor, rank) for rank in range(layout.ranks)]
    assert torch.equal(layout.gather(shards), tensor)
    for rank, shard in enumerate(shards):
        assert tuple(shard.shape) == layout.local_shape(rank)
        assert shard.numel() == layout.local_numel(rank)


@given(layouts())
def test_every_element_has_one_owner(layout: ParamLayout) -> None:
    if not layout.is_sharded:
        return
    tensor = numbered(layout)
    total = 0
    for rank in range(layout.ranks):
        shard = layout.shard(tensor, rank)
        for a, b in layout.owned(rank):
            total += int(shard.narrow(layout.dim, a, b - a).sum())
    assert total == int(tensor.sum())


@given(layouts())
def test_replicas_hold_the_same_elements(layout: ParamLayout) -> None:
    tensor = numbered(layout)
    for group in layout.replica_groups:
        pieces = []
        for rank in group:
            shard = layout.shard(tensor, rank)
            ranges = layout.replicated_in(rank, group)
            assert ranges, f"rank {rank} is in {group} but shares nothing"
            pieces.append(torch.cat([shard.narrow(layout.dim, a, b - a) for a, b in ranges], layout.dim))
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)


@given(st.data(), head_counts(), st.sampled_from(sorted(KINDS)))
def test_reshard(data: st.DataObject, counts: tuple[int, int, int], kind: str) -> None:
    q_heads, kv_heads, a = counts
    b = data.draw(st.integers(1, min(8, q_heads)))
    source, target = _layout(kind, q_heads, kv_heads, a), _layout(kind, q_heads, kv_heads, b)
    tensor = numbered(source)
    shards = [source.shard(tensor, rank) for rank in range(a)]
    for rank in range(b):
        assert torch.equal(reshard(shards, source, target, rank), target.shard(tensor, rank))


@given(head_counts())
def test_heads_stay_with_their_group(counts: tuple[int, int, int]) -> None:
    q_heads, kv_heads, tp = counts
    heads = HeadSplit.of(q_heads, kv_heads, tp)
    assert [r for r in heads.q if r[0] == r[1]] == [], "a rank without attention"
    assert heads.q[0][0] == 0 and heads.q[-1][1] == q_heads
    assert all(a[1] == b[0] for a, b in zip(heads.q, heads.q[1:], strict=False))
    for (q0, q1), (g0, g1) in zip(heads.q, heads.kv, strict=True):
        local_groups = (q1 - q0) // (g1 - g0)
        assert (q1 - q0) % (g1 - g0) == 0
        for local in range(q1 - q0):  # repeat_kv pairs local head i with local group i // local_groups
            assert (q0 + local) // (q_heads // kv_heads) == g0 + local // local_groups


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_permuted_blocks_can_be_said(tp: int) -> None:
    heads = HeadSplit.of(8, 8, tp)
    layout = ParamLayout((8 * 3 * 2, 3), 0, codegen(48, tp, heads))
    tensor = numbered(layout)
    assert torch.equal(layout.gather([layout.shard(tensor, r) for r in range(tp)]), tensor)


def test_falcon_7b_multi_query() -> None:
    """[q…q|k|v] with one key/value head: queries split, the pair on both ranks, its gradient to be summed."""
    heads = HeadSplit.of(4, 1, 2)
    layout = ParamLayout((6, 2), 0, Blocks(("q", "k", "v"))(6, 2, heads))
    assert layout.parts == (((0, 2), (4, 5), (5, 6)), ((2, 4), (4, 5), (5, 6)))
    assert layout.replica_groups == ((0, 1),)
    assert layout.replicated_in(1, (0, 1)) == ((2, 3), (3, 4))
    assert layout.owned(0) == ((0, 4),) and layout.owned(1) == ((0, 2),)
    assert layout.replica_count(1) == 2


def test_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="indices from 2 of dimension 0 are on no rank"):
        ParamLayout((6, 2), 0, (((0, 2),), ((3, 6),)))


def test_more_ranks_than_heads() -> None:
    with pytest.raises(PolicyError, match="tp_size=8 is larger than the number of attention heads \\(4\\)"):
        HeadSplit.of(4, 2, 8)
