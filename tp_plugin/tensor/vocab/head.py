"""The output head: from hidden states to deferred logits, and back without their gradient ever being whole."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.tensor import regions
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.forward import Forward, WrappedForward, runs_as
from tp_plugin.tensor.graphs import end_graph, skip
from tp_plugin.tensor.peer_reads import Held
from tp_plugin.tensor.vocab.blocks import pieces
from tp_plugin.tensor.vocab.expr import ALL, Expr, HeadOutput, HeadProduct, pad
from tp_plugin.tensor.vocab.kernels import autocast_dtype
from tp_plugin.tensor.vocab.logits import Logits, in_graph, incoming
from tp_plugin.tensor.vocab.vocabulary import Vocabulary

Fetched = Callable[[], contextlib.AbstractContextManager[Any]]
"""Inside of ``fetched()`` a partitioned weight (ZeRO-3) is there for the backward."""


class VocabularyColumns:
    """Hooks of an output head that computes this rank's logits."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    @skip
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``f`` at the head's input. A graph ends here: torch.compile cannot trace deferred logits."""
        end_graph()  # before what the model's forward does with them
        return (regions.copy_to_tp(args[0], self.vocabulary.group), *args[1:])

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Local logits (…, columns) → logits (…, vocabulary), gathered only if that is asked for."""
        vocabulary = self.vocabulary
        if isinstance(output, Logits):
            return output
        if vocabulary.group.size == 1 or vocabulary.peers.wants_full:
            return regions.gather_from_tp(output, vocabulary.group)[..., : vocabulary.size]
        own = module.forward.own if isinstance(module.forward, FusedForward) else module.forward
        if runs_as(own, nn.Linear):
            # what nn.Linear recorded is dropped: its backward would need the gradient of all logits at once
            return deferred(args[0], module.weight, module.bias, output, vocabulary)  # type: ignore[arg-type]
        return self.of_columns(output)

    def of_columns(self, output: torch.Tensor) -> torch.Tensor:
        """Logits, of which every rank has computed its own columns, ``output``."""
        vocabulary = self.vocabulary
        width, shape = vocabulary.width, output.shape

        def gradient(_: Any, grad: Expr, position: int) -> torch.Tensor:
            return pad(grad.block(ALL, vocabulary.mine), width).reshape(shape)

        made = _logits(_in_memory(output, vocabulary), shape[:-1], vocabulary)
        return in_graph(made, [output], (), gradient)


def deferred(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    vocabulary: Vocabulary,
    fetched: Fetched = contextlib.nullcontext,
) -> torch.Tensor:
    """Deferred logits (…, vocabulary) of a linear layer on ``x`` (…, n), of which ``output`` (…, columns) is known.

    ``weight`` is (columns, n), ``bias`` (columns,); ``x`` has passed :func:`~tp_plugin.tensor.regions.copy_to_tp`.
    """
    result: torch.Tensor = Linear.apply(x, weight, bias, _in_memory(output, vocabulary), vocabulary, fetched)
    return result


class FusedForward(WrappedForward):
    """The forward of a head that keeps no logits: they are computed where some of them are used."""

    def __init__(self, module: nn.Module, own: Forward, vocabulary: Vocabulary):
        super().__init__(module, own)
        self.vocabulary = vocabulary

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n) → deferred logits (…, vocabulary), or what the module computes itself."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        if self.vocabulary.group.size == 1 or self.vocabulary.peers.wants_full:
            return self.own(x)
        if not runs_as(self.own, nn.Linear):
            _warn_kept(f"the head is a {type(self.module).__name__}, not a plain nn.Linear")
            return self.own(x)
        if not stays(weight):
            _warn_kept("its weight is gathered for the head's forward only (ZeRO-3, FSDP2)")
            return self.own(x)
        return fused(x, weight, self.module.bias, self.vocabulary)  # type: ignore[arg-type]


def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocabulary: Vocabulary) -> torch.Tensor:
    """:func:`deferred` logits of which the output is not known: it is computed block by block, each time it is used."""
    dtype = autocast_dtype(x.device.type) or x.dtype
    rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    own_bias = None if bias is None else bias.detach()
    start, peers = vocabulary.mine[0], vocabulary.peers
    expr = HeadProduct(rows, weight.detach(), own_bias, dtype, start, (0, 0), peers)
    held = peers.hold(functools.partial(expr.block, ALL, vocabulary.mine), x.device)
    expr.number = held.number
    result: torch.Tensor = Linear.apply(x, weight, bias, (expr, held), vocabulary, contextlib.nullcontext)
    return result


def stays(weight: torch.Tensor) -> bool:
    """Whether a weight is there outside of its module's forward and backward: no engine partitions it in between."""
    return not hasattr(weight, "ds_id") and not hasattr(weight, "tp_gathered")


@functools.cache
def _warn_kept(reason: str) -> None:
    warnings.warn(f"tp_plugin.fused_head: logits are kept in memory as without it, because {reason}", stacklevel=2)


Known = tuple[HeadOutput | HeadProduct, Held]
"""A head's output, as an expression and as what other ranks may read."""


def _in_memory(output: torch.Tensor, vocabulary: Vocabulary) -> Known:
    data = output.detach().reshape(-1, output.shape[-1])
    held = vocabulary.peers.hold(data, data.device)
    return HeadOutput(data, vocabulary.mine[0], held.number), held


def _logits(known: Known, lead: torch.Size, vocabulary: Vocabulary) -> Logits:
    expr, held = known
    device = expr.data.device if isinstance(expr, HeadOutput) else expr.x.device
    return Logits.make(vocabulary, expr, torch.Size((*lead, vocabulary.size)), device, (held,))


class Linear(torch.autograd.Function):
    """Deferred logits of a linear layer whose output is known, or computed at need.

    x (…, n), weight (columns, n), bias (columns,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        known: Known,
        vocabulary: Vocabulary,
        fetched: Fetched,
    ) -> Logits:
        ctx.save_for_backward(x, weight, bias)
        ctx.vocabulary, ctx.dtype, ctx.fetched = vocabulary, known[0].dtype, fetched
        return _logits(known, x.shape[:-1], vocabulary)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        expr = incoming(grad, -1)
        with ctx.fetched():
            return *_linear_backward(ctx, expr, x, weight, bias), None, None, None


def _linear_backward(
    ctx: Any, grad: Expr, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients by blocks of columns: each block of the logits' gradient is used up before the next is computed.

    A 16-bit product is rounded once, so it is not added up from blocks: the input's gradient then takes blocks of rows.
    """
    first, last = ctx.vocabulary.mine
    own = last - first
    rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)  # the dtype of the product, which autocast may have chosen
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    size = ctx.dtype.itemsize
    adds_up = size >= 4
    like = torch.empty_like if own == len(weight) else torch.zeros_like  # padding has no gradient
    dx = (torch.zeros_like if adds_up or not own else torch.empty_like)(rows) if for_x else None
    dweight = like(weight) if for_weight else None
    dbias = like(bias) if for_bias and bias is not None else None

    def blocks(lines: int, width: int) -> Iterator[tuple[int, int]]:
        return pieces(lines, width, size, max(grad.cost, size), rows.device)

    if dweight is not None or dbias is not None or adds_up:
        for left, right in blocks(own, len(rows)):
            block = grad.block(ALL, (first + left, first + right)).to(ctx.dtype)
            if dx is not None and adds_up:
                dx.addmm_(block, weight[left:right].to(ctx.dtype))
            if dweight is not None:
                _multiply(block.t(), rows, dweight[left:right])
            if dbias is not None:
                torch.sum(block, 0, dtype=dbias.dtype, out=dbias[left:right])
            del block  # before the next is computed
    if dx is not None and not adds_up and own:
        columns = weight[:own].to(ctx.dtype)
        for top, bottom in blocks(len(rows), own):
            _multiply(grad.block(slice(top, bottom), (first, last)).to(ctx.dtype), columns, dx[top:bottom])
    return None if dx is None else dx.to(x.dtype).view(x.shape), dweight, dbias


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which may be of another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
