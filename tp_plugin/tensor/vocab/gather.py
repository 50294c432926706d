"""How ranks come to communicate about deferred values, and how all columns of them are gathered."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import ALL, Expr, HeadOutput, HeadProduct, newest, pad, signature, visit
from tp_plugin.tensor.vocab.vocabulary import Vocabulary


def together(operation: str, vocabulary: Vocabulary, *operands: Expr | torch.Tensor) -> bool:
    """Whether all ranks are at this operation on the same operands, so that it may communicate."""
    return vocabulary.peers.propose(f"{operation} {signature(operands)}", newest(operands))


def gather(expr: Expr, vocabulary: Vocabulary, device: torch.device) -> torch.Tensor:
    """All columns (tokens, vocabulary): one all-gather if all ranks are here, else read from other ranks' threads."""
    group = vocabulary.group
    columns = [vocabulary.owned(rank) for rank in range(group.size)]
    if together("gather", vocabulary, expr):
        own = pad(expr.block(ALL, vocabulary.mine), vocabulary.width)
        parts = [part[:, : last - first] for part, (first, last) in zip(group.all_gather(own), columns, strict=True)]
        return torch.cat(parts, -1)

    def of_rank(rank: int, node: Any) -> Any:
        if not isinstance(node, HeadOutput | HeadProduct) or rank == group.rank:
            return node
        return HeadOutput(vocabulary.peers.read(rank, node.number, device), columns[rank][0], node.number)

    blocks = []
    for rank, (first, last) in enumerate(columns):
        if first < last:
            there: Expr = visit(expr, functools.partial(of_rank, rank))
            blocks.append(there.block(ALL, (first, last)))
    return torch.cat(blocks, -1)
