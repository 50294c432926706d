"""What is summed over the vocabulary: each rank over its own columns, then a few numbers per token over the ranks.

Every function here communicates, so all ranks of the TP group must call it. Results are equal on all of them, and so
are the gradients that come back: the ranks compute one and the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tp_plugin.tensor.vocab import kernels
from tp_plugin.tensor.vocab.blocks import pieces
from tp_plugin.tensor.vocab.expr import Apply, Expr, HeadProduct, PerRow, add_one_hot, exact, take
from tp_plugin.tensor.vocab.logits import Logits, in_graph
from tp_plugin.tensor.vocab.vocabulary import Columns, Vocabulary


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize <= 4 else torch.float64


def blocks(
    expr: Expr, rows: int, vocabulary: Vocabulary, device: torch.device, cost: int = 4
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and this rank's columns of them; nothing if it has only padding.

    Args:
        cost: bytes of temporaries for an element, beside those of ``expr``, that the caller takes for a block.
    """
    first, last = vocabulary.mine
    if first < last:
        for top, bottom in pieces(rows, last - first, expr.stored or expr.dtype.itemsize, expr.cost + cost, device):
            yield slice(top, bottom), expr.block(slice(top, bottom), (first, last))


def statistics(logits: Logits, labels: torch.Tensor | None = None, with_sum: bool = False) -> torch.Tensor:
    """Log-sum-exp, entry at the label and sum of every row over the whole vocabulary, (1, 2 or 3, rows).

    As in Megatron-LM's vocab-parallel cross-entropy (Shoeybi et al. 2019, section 3), but with each rank's own maximum:
    one all-gather of one number more than the result has per row.
    """
    vocabulary, expr, device = logits.vocabulary, exact(logits.expr), logits.device
    dtype = wide(logits.dtype)
    # the largest entry, the sum of exponentials relative to it, the entry at the label, the sum
    mine = torch.empty(2 if labels is None else 3 + with_sum, logits.rows, dtype=dtype, device=device)
    if vocabulary.mine[0] == vocabulary.mine[1]:
        mine[0], mine[1:] = -torch.inf, 0
    for rows, block in blocks(expr, logits.rows, vocabulary, device, kernels.cost(expr.dtype, dtype, device)):
        kernels.row_statistics(block, None if labels is None else labels[rows], vocabulary.mine, mine[:, rows])
        del block  # before the next is computed
    everyone = torch.stack(vocabulary.group.all_gather(mine))
    highest = kernels.finite(everyone[:, 0].amax(0))
    # added in one order on every rank: the results are equal
    found = everyone[:, 1:].sum(0)
    total = (everyone[:, 1] * (kernels.finite(everyone[:, 0]) - highest).exp_()).sum(0)
    torch.add(highest, total.log_(), out=found[0])
    at = None if labels is None else PerRow(labels.unsqueeze(-1), is_broadcast=False)
    return in_graph(found, [logits], (logits.expr, found[0].clone(), at), _statistics_backward)


def _statistics_backward(saved: Any, grads: torch.Tensor, position: int) -> Expr:
    expr, log_sum, labels = saved
    weights = [PerRow(grad.unsqueeze(-1), is_broadcast=False) for grad in grads]
    args = (exact(expr), PerRow(log_sum.unsqueeze(-1), is_broadcast=False), labels, *weights)
    extra = kernels.cost(args[0].dtype, log_sum.dtype, log_sum.device)
    fresh = {"in_place": isinstance(args[0], HeadProduct)}
    return Apply(kernels.statistics_gradient, args, expr.dtype, fresh, of_block=True, extra=extra)


def row_sums(logits: Logits) -> torch.Tensor:
    """The sum of every row over the whole vocabulary, (rows,), in the dtype that sums are in. One all-reduce."""
    dtype = logits.dtype
    found = sum_rows(logits.expr, logits.rows, logits.vocabulary, logits.device)
    return in_graph(found, [logits], (), lambda _, grad, at: PerRow(grad.to(dtype).unsqueeze(-1)))


def sum_rows(expr: Expr, rows: int, vocabulary: Vocabulary, device: torch.device) -> torch.Tensor:
    """:func:`row_sums` outside of the graph."""
    found = torch.zeros(rows, dtype=wide(expr.dtype), device=device)
    for some, block in blocks(expr, rows, vocabulary, device):
        found[some] = block.sum(-1, dtype=found.dtype)
    return vocabulary.group.all_reduce(found)


def entries(logits: Logits, at: torch.Tensor) -> torch.Tensor:
    """The entries ``at`` (rows, k) of every row. One all-reduce."""
    dtype = logits.dtype
    found = torch.zeros(at.shape, dtype=dtype, device=at.device)
    for rows, block in blocks(logits.expr, logits.rows, logits.vocabulary, logits.device):
        found[rows] = take(block, at[rows], logits.vocabulary.mine)

    def gradient(at: torch.Tensor, grad: torch.Tensor, position: int) -> Expr:
        return Apply(_one_hot, (PerRow(at, False), PerRow(grad, False)), dtype, of_block=True)

    return in_graph(logits.vocabulary.group.all_reduce(found), [logits], at, gradient)


def _one_hot(at: torch.Tensor, weight: torch.Tensor, columns: Columns, dtype: torch.dtype) -> torch.Tensor:
    return add_one_hot(weight.new_zeros(len(at), columns[1] - columns[0]), at, weight, columns).to(dtype)


def largest(logits: Logits, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest entries of every row in falling order and which they are, both (rows, k).

    One all-gather of the entries and one of their places. For k = 1 the first of equals, as torch.argmax has it.
    """
    vocabulary = logits.vocabulary
    highest = torch.full((logits.rows, k), -torch.inf, dtype=logits.dtype, device=logits.device)
    places = torch.zeros((logits.rows, k), dtype=torch.int64, device=logits.device)
    for rows, block in blocks(logits.expr, logits.rows, vocabulary, logits.device):
        found, at = _top(block, min(k, block.shape[-1]))
        highest[rows, : at.shape[1]] = found
        places[rows, : at.shape[1]] = at + vocabulary.mine[0]
    everyone, where = (torch.cat(vocabulary.group.all_gather(part), -1) for part in (highest, places))
    found, at = _top(everyone, k)
    return found, where.gather(-1, at)


def _top(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if k > 1:
        found, at = block.topk(k, -1)
        return found, at
    at = block.argmax(-1, keepdim=True)
    return block.gather(-1, at), at
