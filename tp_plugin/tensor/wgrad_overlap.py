"""Weight gradients of a block's column-parallel linears, computed while the gradient of their input is all-reduced.

Plain autograd computes, linear by linear, the gradient of the input and that of the weight; the input's is complete,
and can be summed over the ranks, only after the last of them. Here the linears are products of *detached* weights, of
which autograd computes the input's gradient only, and notes the gradient of each one's output. The block's input is one
node over the input *and* the linears' parameters: it starts the sum, computes the parameters' gradients while that is
under way, and waits (Megatron-LM: ``gradient_accumulation_fusion`` and its asynchronous all-reduce; here for all
linears of a block together). Beside that one there are no nodes in Python, which cost more than small products.

The sum is made in place: a product has made that gradient, or autograd has added it up. (It is copied for who looks.)

Linears that read one input and whose weights lie back to back in one storage run as one: the first that is called
computes the outputs of all, and its siblings' are ready when those are called.

Both hold for the very tensor that entered the block, for plain parameters, and while gradients are recorded. Whatever
else a linear is called with (a hook's or an adapter's tensor, partitioned weights, under ``torch.compile``) takes the
layer's own forward; the ranks' collectives are the same either way.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.mesh.groups import Group, Pending
from tp_plugin.tensor import regions, sequence
from tp_plugin.tensor.back_to_back import back_to_back
from tp_plugin.tensor.first_order import apply, first_order
from tp_plugin.tensor.sequence import Regather, Stack


class Trained(NamedTuple):
    """A linear's parameters as the input's node knows them.

    Attributes:
        weight_at, bias_at: their numbers among those that are trained, else None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_at: int | None
    bias_at: int | None


class Product(NamedTuple):
    """One product of a run.

    Attributes:
        input: which of the tensors that entered the block.
        linears: those that it computes, more than one if they run as one.
        widths: of their outputs.
        transposed: whether their weights are (in, out).
    """

    input: int
    linears: tuple[Trained, ...]
    widths: tuple[int, ...]
    transposed: bool


class Found(NamedTuple):
    """What a backward found: the gradient of the output of a product, and the linears that it is of."""

    product: Product
    linears: tuple[Trained | None, ...]
    grad: torch.Tensor


class Backward:
    """What the backward of one run of a block needs. The graph holds it, so that it holds nothing of the graph's.

    Args:
        group: the TP group.
        span: how the input lies if it is a part of the sequence.
        overlap: compute the parameters' gradients while the input's is summed.
        dtypes: of the trained parameters.
        keeps: autograd keeps what entered; else it is gathered again.

    Attributes:
        regather: what gathers the input again.
        watched: somebody looks at the gradient of the input.
    """

    def __init__(
        self, group: Group, span: tuple[int, int] | None, overlap: bool, dtypes: list[torch.dtype], keeps: bool
    ):
        self.group, self.span, self.overlap, self.dtypes, self.keeps = group, span, overlap, dtypes, keeps
        self.regather: Regather | None = None
        self.watched = False
        self._found: list[tuple[int, Found]] = []

    def watch(self, y: torch.Tensor, product: Product) -> None:
        """Note the gradient of ``y``, the output of ``product``, when it comes."""
        node = (y if y._base is None else y._base).grad_fn  # that of a view is another once it is changed in place
        if node is not None:  # a module may compute something without gradients
            node.register_prehook(functools.partial(self.note, product, product.linears))

    def note(
        self, product: Product, linears: tuple[Trained | None, ...], grads: tuple[torch.Tensor | None, ...]
    ) -> None:
        """Note the gradient of the output of ``product``; ``linears``: None for those whose output had none."""
        (grad,) = grads
        if grad is not None:
            self._found.append((torch._C._current_graph_task_id(), Found(product, linears, grad)))
            if self.regather is not None:
                self.regather.start()  # while the input's gradient is computed

    def take(self) -> list[Found]:
        """What was found in the backward that runs. (Another, that came no further than to the products, is over.)"""
        task = torch._C._current_graph_task_id()
        found, self._found = self._found, []
        return [one for at, one in found if at == task]


class BlockRun:
    """One run of a block.

    Attributes:
        backward: what its backward needs.
        linears: those whose parameters the input's node knows.
        entered: the tensors that entered.
        versions: how often these had been changed in place by then.
        regather: what gathers the input again in the backward, if autograd does not keep it whole.
        ready: outputs of linears that were computed with a sibling's.
    """

    def __init__(self, backward: Backward, linears: dict[nn.Module, Trained], entered: tuple[torch.Tensor, ...]):
        self.backward, self.linears, self.entered = backward, linears, entered
        self.versions = tuple(map(operator.attrgetter("_version"), entered))
        self.regather: Regather | None = None
        self.ready: dict[nn.Module, torch.Tensor] = {}


class BlockInput:
    """``f`` at the input of a block, or of two in a parallel residual.

    Args:
        group: the TP group.
        overlap: compute the parameters' gradients while the input's is summed.
        fuse: run linears as one where their weights allow it.
    """

    def __init__(self, group: Group, overlap: bool = False, fuse: bool = False):
        self.group, self.overlap, self.fuse = group, overlap, fuse
        self.linears: list[nn.Module] = []
        self.siblings: list[tuple[nn.Module, ...]] = []
        """Linears that are called with one and the same input."""
        self.run: BlockRun | None = None

    def enter(self, xs: Sequence[torch.Tensor], stack: Stack | None, regathers: bool = False) -> Sequence[torch.Tensor]:
        """``f`` at all inputs of the block, or the gathering of its one input if that is a part of the sequence.

        What is gathered is not kept if the caller ``regathers``, who then sets the run's ``regather``.
        """
        group = self.group
        self.run = None
        gathered = stack is not None and stack.runs
        linears, trained = self._parameters() if self._may_overlap(xs, group) else ({}, [])
        if not linears:
            return [sequence.enter(xs[0], stack, group)] if gathered else regions.copy_all_to_tp(xs, group)
        span = stack.span(xs[0]) if stack is not None and gathered else None
        backward = Backward(group, span, self.overlap, [p.dtype for p in trained], not regathers)
        entered = apply(_BlockInput, backward, len(xs), *xs, *trained)
        self.run = BlockRun(backward, linears, entered)
        return entered  # type: ignore[no-any-return]

    def end(self) -> None:
        """The block's linears have run."""
        self.run = None

    def _may_overlap(self, xs: Sequence[torch.Tensor], group: Group) -> bool:
        if not self.linears or group.size == 1 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        for x in xs:
            alike = x.dtype == xs[0].dtype and x.device == xs[0].device
            if not (type(x) is torch.Tensor and x.requires_grad and x.is_floating_point() and alike):
                return False
        return True

    def _parameters(self) -> tuple[dict[nn.Module, Trained], list[torch.Tensor]]:
        """Of the linears whose parameters are plain: what they are, and those that are trained."""
        found: dict[nn.Module, Trained] = {}
        trained: list[torch.Tensor] = []
        for linear in self.linears:
            weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
            if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
                continue
            if bias is not None and type(bias) is not nn.Parameter:
                continue
            weight_at = bias_at = None
            if weight.requires_grad:
                weight_at = len(trained)
                trained.append(weight)
            if bias is not None and bias.requires_grad:
                bias_at = len(trained)
                trained.append(bias)
            found[linear] = Trained(weight, bias, weight_at, bias_at)
        return found, trained

    def output(self, linear: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The output of ``linear`` for ``x``; None if it has to compute that by itself."""
        run = self.run
        if run is None or linear not in run.linears or not torch.is_grad_enabled():
            return None
        at = 0
        if not run.entered:  # of a policy that names no input
            return None
        if run.entered[0] is not x and (at := next((i for i, one in enumerate(run.entered) if one is x), -1)) < 0:
            return None
        if x._version != run.versions[at]:  # changed in place: no longer what entered
            return None
        if linear in run.ready:
            return run.ready.pop(linear)
        together = self._siblings(linear, run) if self.fuse and len(run.entered) == 1 else (linear,)
        for one in together:
            known, now = run.linears[one], one._parameters
            if now.get("weight") is not known.weight or now.get("bias") is not known.bias:
                return None
        outputs = _computed(run, at, together)
        if len(together) == 1:
            return outputs[0]
        run.ready.update(zip(together, outputs, strict=True))
        return run.ready.pop(linear)

    def _siblings(self, linear: nn.Module, run: BlockRun) -> tuple[nn.Module, ...]:
        for siblings in self.siblings:
            if linear not in siblings or any(one not in run.linears or _is_watched(one) for one in siblings):
                continue
            weights = [run.linears[one].weight for one in siblings]
            if len({weight.requires_grad for weight in weights}) > 1:
                continue  # no gradient is computed for nothing
            if back_to_back(weights) is not None:
                return siblings
        return (linear,)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody may call it with another input than its siblings, or asks for its own gradients."""
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class _BlockInput(torch.autograd.Function):
    """``f``, or the gathering of the tokens, and the parameters' gradients while its backward communicates."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, count: int, *all: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run, ctx.count = backward, count
        ctx.set_materialize_grads(count > 1)
        if backward.span is None:
            entered = tuple(x.view_as(x) for x in all[:count])
        else:
            entered = tuple(sequence.gather_tokens(x, *backward.span, backward.group) for x in all[:count])
        if backward.keeps and backward.dtypes:
            ctx.save_for_backward(*entered)
        return entered

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        run: Backward = ctx.run
        products = run.take()
        if grads[0] is None:  # nothing came, on no rank
            return (None,) * len(ctx.needs_input_grad)
        under_way = _start_sum(run, grads, bool(products))
        if not run.overlap:
            under_way.wait()
        found = _gradients(ctx, products)
        summed = under_way.wait()
        if len(grads) > 1:
            parts = summed.split([grad.numel() for grad in grads])
            return None, None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True)), *found
        return None, None, summed, *found


def _start_sum(run: Backward, grads: Sequence[torch.Tensor], computed: bool) -> Pending:
    """Begin to sum the input's gradient; ``computed``: there is a product in it, so that nobody else can have it."""
    if len(grads) > 1:
        return run.group.start_all_reduce(torch.cat([grad.reshape(-1) for grad in grads]))
    (grad,) = grads
    if run.span is not None:
        return sequence.start_reduce_scatter_tokens(grad, run.span[0], run.group)
    if not computed or run.watched or grad.requires_grad or not grad.is_contiguous():
        grad = grad.clone(memory_format=torch.contiguous_format)
    return run.group.start_all_reduce(grad)


def _gradients(ctx: Any, products: list[Found]) -> list[torch.Tensor | None]:
    """Gradients of the trained parameters, of the products that the backward has come through; they are used up."""
    run: Backward = ctx.run
    wanted = ctx.needs_input_grad[2 + ctx.count :]
    found: list[torch.Tensor | None] = [None] * len(run.dtypes)

    def add(at: int | None, grad: torch.Tensor) -> None:
        if at is not None and wanted[at]:
            before, grad = found[at], grad.to(run.dtypes[at])
            found[at] = grad if before is None else before + grad

    inputs: Any = ()
    while products:
        (at, _, widths, transposed), linears, grad = products.pop(0)
        weights = biases = False
        for one in linears:
            if one is not None:
                weights |= one.weight_at is not None and wanted[one.weight_at]
                biases |= one.bias_at is not None and wanted[one.bias_at]
        if grad.dim() > 2:
            grad = grad.reshape(-1, grad.shape[-1])
        if weights:
            if not inputs:  # once: checkpoints give each tensor only once
                inputs = ctx.saved_tensors if run.regather is None else (run.regather.take(),)
            rows = inputs[at].reshape(-1, inputs[at].shape[-1]).to(grad.dtype)
            weight = rows.t() @ grad if transposed else grad.t() @ rows
            for one, part in zip(linears, weight.split(widths, 1 if transposed else 0), strict=True):
                add(None if one is None else one.weight_at, part)
        if biases:
            for one, part in zip(linears, grad.sum(0).split(widths), strict=True):
                add(None if one is None else one.bias_at, part)
    return found


def _computed(run: BlockRun, at: int, linears: tuple[nn.Module, ...]) -> Sequence[torch.Tensor]:
    """The outputs of ``linears``, as one product of what entered at ``at``."""
    x, backward = run.entered[at], run.backward
    first, transposed = run.linears[linears[0]], isinstance(linears[0], Conv1D)
    if x._backward_hooks or x.retains_grad:
        backward.watched = True
    regather = run.regather if backward.regather is None else None
    if regather is not None and any([run.linears[one].weight_at is not None for one in linears]):
        regather.count()
        backward.regather = regather
    if len(linears) > 1:
        return _fused(x, tuple([run.linears[one] for one in linears]), at, backward)
    weight, bias = first.weight.detach(), None if first.bias is None else first.bias.detach()
    widths = (weight.shape[1 if transposed else 0],)
    if transposed:  # one matrix by another: F.linear would copy the transposed weight
        flat = x.reshape(-1, x.shape[-1])
        y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
        backward.watch(y, Product(at, (first,), widths, True))
        return (y.view(*x.shape[:-1], *widths),)
    y = F.linear(x, weight, bias)
    backward.watch(y, Product(at, (first,), widths, False))
    return (y,)


def _fused(x: torch.Tensor, places: tuple[Trained, ...], at: int, backward: Backward) -> Sequence[torch.Tensor]:
    weight = back_to_back([one.weight for one in places])
    assert weight is not None
    biases = [one.bias.detach() for one in places if one.bias is not None]
    widths = tuple([one.weight.shape[0] for one in places])
    y = F.linear(x, weight, torch.cat(biases) if biases else None)
    return apply(_Cut, y, backward, Product(at, places, widths, False))  # type: ignore[no-any-return]


class _Cut(torch.autograd.Function):
    """Columns as tensors that autograd does not know as views of one: each may be changed in place."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, backward: Backward, product: Product) -> tuple[torch.Tensor, ...]:
        ctx.run, ctx.product, ctx.shape = backward, product, y.shape[:-1]
        ctx.set_materialize_grads(False)
        found, at = [], y.storage_offset()
        for width in product.widths:
            part = y.new_empty(0)
            found.append(part.set_(y.untyped_storage(), at, (*y.shape[:-1], width), y.stride()))
            at += width
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        product: Product = ctx.product
        linears: tuple[Trained | None, ...] = product.linears
        parts = [grad for grad in grads if grad is not None]
        if not parts:
            return None, None, None
        if len(parts) < len(grads):  # weights of outputs without a gradient have none either, as in plain autograd
            some, widths = parts[0], product.widths
            parts = [some.new_zeros(*ctx.shape, w) if g is None else g for g, w in zip(grads, widths, strict=True)]
            linears = tuple([None if g is None else one for g, one in zip(grads, linears, strict=True)])
        whole = torch.cat(parts, -1)
        ctx.run.note(product, linears, (whole,))
        return whole, None, None
