"""What is summed over the vocabulary: each rank over its own columns, then a few numbers per token over the ranks.

Every function here communicates, so all ranks of the TP group must call it. Results are equal on all of them, and so
are the gradients that come back: the ranks compute one and the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from tp_plugin.runtime.current import require
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.vocab.expr import Apply, Cast, Expr, Leaf, OneHot, PerRow, StatisticsGradient, Values, take
from tp_plugin.tensor.vocab.tensor import Logits, Vocabulary, blank, incoming, recalled, remember

PIECES = 10
"""Blocks that a rank's rows or columns are computed in, for each temporary of a block's size."""

SMALLEST = 1 << 16
"""Elements of a block that is not worth dividing."""


def pieces(length: int, other: int, depth: int) -> Iterator[tuple[int, int]]:
    """Ranges of a dimension of ``length``, so that blocks with ``depth`` temporaries stay small."""
    step = max(-(-length // (PIECES * (1 + depth))), min(length, SMALLEST // max(other, 1)), 1)
    return ((first, min(first + step, length)) for first in range(0, length, step))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize <= 4 else torch.float64


class Source(NamedTuple):
    """What this rank's columns are computed from."""

    expr: Expr
    tensors: Mapping[Leaf, torch.Tensor]
    rows: int
    vocabulary: Vocabulary
    device: torch.device

    @staticmethod
    def of(logits: Logits) -> Source:
        expr, tensors = logits.ordered()
        return Source(expr, tensors, logits.rows, logits.vocabulary, logits.device)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and this rank's columns of them; nothing if it has only padding."""
        first, last = columns = self.vocabulary.mine
        values = Values(self.tensors, first)
        if first < last:
            for top, bottom in pieces(self.rows, last - first, self.expr.depth):
                rows = slice(top, bottom)
                yield rows, self.expr.pick(rows, columns, values)


def statistics(source: Source, labels: torch.Tensor | None, with_sum: bool) -> torch.Tensor:
    """Log-sum-exp, entry at the label and sum of every row over the whole vocabulary, (1, 2 or 3, rows).

    One all-gather of one number more than that per row.
    """
    dtype = wide(source.expr.dtype)
    # the largest entry, the sum of exponentials relative to it, the entry at the label, the sum
    mine = torch.zeros(2 if labels is None else 3 + with_sum, source.rows, dtype=dtype, device=source.device)
    mine[0] = -torch.inf
    for rows, raw in source.blocks():
        block = raw.to(dtype)
        mine[0, rows] = block.amax(-1)
        if labels is not None:
            mine[2, rows] = take(block, labels[rows, None], source.vocabulary.mine).squeeze(-1)
        if with_sum:
            mine[3, rows] = block.sum(-1)
        mine[1, rows] = (block - _finite(mine[0, rows]).unsqueeze(-1)).exp_().sum(-1)
    everyone = torch.stack(require().mesh.tp.all_gather(mine))
    highest = _finite(everyone[:, 0].amax(0))
    # added in one order on every rank: the results are equal
    found = everyone[:, 1:].sum(0)
    found[0] = highest + (everyone[:, 1] * (_finite(everyone[:, 0]) - highest).exp()).sum(0).log()
    return found


def _finite(highest: torch.Tensor) -> torch.Tensor:
    # of entries that are all -inf (or of none) the sum of exponentials is 0, relative to anything
    return highest.masked_fill(highest == -torch.inf, 0)


class Statistics(torch.autograd.Function):
    """:func:`statistics` of deferred logits; the gradient is deferred."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, labels: torch.Tensor, with_sum: bool) -> tuple[torch.Tensor, ...]:
        source = Source.of(logits)
        found = statistics(source, labels, with_sum)
        log_sum, at = Leaf(), Leaf()
        remember(ctx, logits, {**source.tensors, log_sum: found[0], at: labels})
        ctx.expr, ctx.log_sum, ctx.at = source.expr, log_sum, at
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Logits, None, None]:
        tensors = recalled(ctx)
        weights = Leaf()
        zero = torch.zeros_like(tensors[ctx.log_sum])
        tensors[weights] = torch.stack([zero if grad is None else grad for grad in grads])
        with_sum = len(grads) > 2 and grads[2] is not None
        expr = StatisticsGradient(ctx.expr, ctx.expr.dtype, ctx.log_sum, ctx.at, weights, with_sum)
        return Logits.make(ctx.vocabulary, expr, tensors, ctx.shape, ctx.device), None, None


class LogSoftmax(torch.autograd.Function):
    """Logarithms of probabilities, deferred."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, dtype: torch.dtype) -> Logits:
        source = Source.of(logits)
        log_sum = Leaf()
        tensors = {**source.tensors, log_sum: statistics(source, None, False)[0].unsqueeze(-1)}
        precise = wide(source.expr.dtype)
        log: Expr = Apply(torch.sub, (cast(source.expr, precise), PerRow(log_sum, precise)), {}, precise)
        remember(ctx, logits, tensors)
        ctx.log, ctx.dtype = log, source.expr.dtype
        ctx.set_materialize_grads(False)
        return Logits.make(logits.vocabulary, cast(log, dtype), tensors, blank(logits), logits.device, logits.held)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Logits | None, None]:
        if grad is None:
            return None, None
        expr, tensors = incoming(grad, ctx.axis)
        tensors |= recalled(ctx)
        total = Leaf()
        source = Source(expr, tensors, ctx.shape.numel() // ctx.vocabulary.size, ctx.vocabulary, ctx.device)
        tensors = {**tensors, total: row_sums(source).unsqueeze(-1)}
        found = Apply(_log_softmax_gradient, (expr, ctx.log, PerRow(total, ctx.log.dtype)), {}, ctx.log.dtype)
        return Logits.make(ctx.vocabulary, cast(found, ctx.dtype), tensors, ctx.shape, ctx.device), None


def _log_softmax_gradient(grad: torch.Tensor, log: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return grad - log.exp().mul_(total)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """``expr`` in ``dtype``."""
    return expr if expr.dtype == dtype else Cast(expr, dtype)


def row_sums(source: Source) -> torch.Tensor:
    """The sum of every row over the whole vocabulary, (rows,). One all-reduce."""
    found = torch.zeros(source.rows, dtype=wide(source.expr.dtype), device=source.device)
    for rows, block in source.blocks():
        found[rows] = block.sum(-1, dtype=found.dtype)
    return require().mesh.tp.all_reduce(found)


class RowSum(torch.autograd.Function):
    """:func:`row_sums` of deferred values."""

    @staticmethod
    def forward(ctx: Any, logits: Logits) -> torch.Tensor:
        remember(ctx, logits, {})
        ctx.dtype = logits.expr.dtype
        return row_sums(Source.of(logits))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Logits:
        leaf = Leaf()
        tensors = {leaf: grad.to(ctx.dtype).unsqueeze(-1)}
        return Logits.make(ctx.vocabulary, PerRow(leaf, ctx.dtype), tensors, ctx.shape, ctx.device)


class Take(torch.autograd.Function):
    """The entries ``at`` (rows, k) of every row. One all-reduce."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, at: torch.Tensor) -> torch.Tensor:
        remember(ctx, logits, {Leaf(): at})
        source = Source.of(logits)
        ctx.dtype = source.expr.dtype
        found = torch.zeros(at.shape, dtype=ctx.dtype, device=at.device)
        for rows, block in source.blocks():
            found[rows] = take(block, at[rows], source.vocabulary.mine)
        return require().mesh.tp.all_reduce(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Logits, None]:
        ((at, places),) = recalled(ctx).items()
        weight = Leaf()
        tensors = {at: places, weight: grad}
        return Logits.make(ctx.vocabulary, OneHot(at, weight, ctx.dtype), tensors, ctx.shape, ctx.device), None


def largest(logits: Logits, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest entries of every row in falling order and which they are, both (rows, k).

    One all-gather of the entries and one of their places. For k = 1 the first of equals, as torch.argmax has it.
    """
    source = Source.of(logits)
    entries = torch.full((source.rows, k), -torch.inf, dtype=source.expr.dtype, device=source.device)
    places = torch.zeros((source.rows, k), dtype=torch.int64, device=source.device)
    for rows, block in source.blocks():
        found, at = _top(block, min(k, block.shape[-1]))
        entries[rows, : at.shape[1]] = found
        places[rows, : at.shape[1]] = at + source.vocabulary.mine[0]
    group = require().mesh.tp
    everyone, where = (torch.cat(group.all_gather(part), -1) for part in (entries, places))
    found, at = _top(everyone, k)
    return found, where.gather(-1, at)


def _top(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if k > 1:
        found, at = block.topk(k, -1)
        return found, at
    at = block.argmax(-1, keepdim=True)
    return block.gather(-1, at), at
