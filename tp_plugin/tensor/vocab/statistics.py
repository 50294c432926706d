"""What is summed over the vocabulary: each rank over its own columns, then a few numbers per token over the ranks.

Every function here communicates, so all ranks of the TP group must call it. Results are equal on all of them, and so
are the gradients that come back: the ranks compute one and the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.vocab.expr import (
    Apply,
    Expr,
    OneHot,
    PerRow,
    Rows,
    add_one_hot,
    cast,
    pieces,
    take,
)
from tp_plugin.tensor.vocab.logits import Logits, gradient_of, incoming, new_strides, recall, remember
from tp_plugin.tensor.vocab.vocabulary import Columns, Vocabulary


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize <= 4 else torch.float64


class Source(NamedTuple):
    """Rows that this rank computes its columns of."""

    expr: Expr
    rows: int
    vocabulary: Vocabulary
    device: torch.device

    @staticmethod
    def of(logits: Logits) -> Source:
        return Source(logits.expr, logits.rows, logits.vocabulary, logits.device)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and this rank's columns of them; nothing if it has only padding."""
        first, last = columns = self.vocabulary.mine
        if first < last:
            for top, bottom in pieces(self.rows, last - first, self.expr.depth):
                rows = slice(top, bottom)
                yield rows, self.expr.block(rows, columns)


def statistics(source: Source, labels: torch.Tensor | None, with_sum: bool) -> torch.Tensor:
    """Log-sum-exp, entry at the label and sum of every row over the whole vocabulary, (1, 2 or 3, rows).

    As in Megatron-LM's vocab-parallel cross-entropy (Shoeybi et al. 2019, section 3), but with each rank's own maximum:
    one all-gather of one number more than the result has per row.
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
    everyone = torch.stack(source.vocabulary.group.all_gather(mine))
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
        found = statistics(Source.of(logits), labels, with_sum)
        remember(ctx, logits, (logits.expr, found[0], labels))
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Logits, None, None]:
        expr, log_sum, labels = recall(ctx)
        weights = torch.stack([torch.zeros_like(log_sum) if grad is None else grad for grad in grads])
        with_sum = len(grads) > 2 and grads[2] is not None
        return gradient_of(ctx, StatisticsGradient(expr, log_sum, labels, weights, with_sum)), None, None


@dataclass(eq=False)
class StatisticsGradient(Expr):
    """The gradient of a row's log-sum-exp, of its entry at the label, and of its sum, each times a number per row.

    ``weights`` (2 or 3, rows) are these numbers.
    """

    of: Expr
    log_sum: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    with_sum: bool

    def __post_init__(self) -> None:
        self.dtype, self.depth = self.of.dtype, self.of.depth + 1

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        log_sum, weights = self.log_sum[rows], self.weights[:, rows]
        block = self.of.block(rows, columns).to(log_sum.dtype) - log_sum.unsqueeze(-1)
        block.exp_().mul_(weights[0].unsqueeze(-1))
        if self.with_sum:
            block.add_(weights[2].unsqueeze(-1))
        return add_one_hot(block, self.labels[rows, None], weights[1].unsqueeze(-1), columns).to(self.dtype)


class LogSoftmax(torch.autograd.Function):
    """Logarithms of probabilities, deferred."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, dtype: torch.dtype) -> Logits:
        precise = wide(logits.expr.dtype)
        log_sum = PerRow(statistics(Source.of(logits), None, False)[0].unsqueeze(-1))
        log = Apply(torch.sub, (cast(logits.expr, precise), log_sum), precise)
        remember(ctx, logits, log)
        ctx.dtype = logits.expr.dtype
        return Logits.make(logits.vocabulary, cast(log, dtype), new_strides(logits), logits.device, logits.held)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Logits | None, None]:
        if grad is None:
            return None, None
        expr, log = incoming(grad, ctx.axis), recall(ctx)
        total = row_sums(Source(expr, ctx.strides.numel() // ctx.vocabulary.size, ctx.vocabulary, ctx.device))
        found = Apply(_log_softmax_gradient, (expr, log, PerRow(total.unsqueeze(-1))), log.dtype)
        return gradient_of(ctx, cast(found, ctx.dtype)), None


def _log_softmax_gradient(grad: torch.Tensor, log: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return grad - log.exp().mul_(total)


def row_sums(source: Source) -> torch.Tensor:
    """The sum of every row over the whole vocabulary, (rows,). One all-reduce."""
    found = torch.zeros(source.rows, dtype=wide(source.expr.dtype), device=source.device)
    for rows, block in source.blocks():
        found[rows] = block.sum(-1, dtype=found.dtype)
    return source.vocabulary.group.all_reduce(found)


class RowSum(torch.autograd.Function):
    """:func:`row_sums` of deferred values."""

    @staticmethod
    def forward(ctx: Any, logits: Logits) -> torch.Tensor:
        remember(ctx, logits)
        ctx.dtype = logits.expr.dtype
        return row_sums(Source.of(logits))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None) -> Logits | None:
        return None if grad is None else gradient_of(ctx, PerRow(grad.to(ctx.dtype).unsqueeze(-1)))


class Take(torch.autograd.Function):
    """The entries ``at`` (rows, k) of every row. One all-reduce."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, at: torch.Tensor) -> torch.Tensor:
        remember(ctx, logits, at)
        ctx.dtype = logits.expr.dtype
        found = torch.zeros(at.shape, dtype=ctx.dtype, device=at.device)
        for rows, block in Source.of(logits).blocks():
            found[rows] = take(block, at[rows], logits.vocabulary.mine)
        return logits.vocabulary.group.all_reduce(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Logits | None, None]:
        return None if grad is None else gradient_of(ctx, OneHot(recall(ctx), grad, ctx.dtype)), None


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
    group = source.vocabulary.group
    everyone, where = (torch.cat(group.all_gather(part), -1) for part in (entries, places))
    found, at = _top(everyone, k)
    return found, where.gather(-1, at)


def _top(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if k > 1:
        found, at = block.topk(k, -1)
        return found, at
    at = block.argmax(-1, keepdim=True)
    return block.gather(-1, at), at
