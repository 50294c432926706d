"""Weight gradients of a block's column-parallel linears, computed while the gradient of their input is all-reduced.

Plain autograd computes, linear by linear, the gradient of the input and that of the weight; the input's is complete,
and can be summed over the ranks, only after the last of them. Here the linears' own nodes compute the input's gradient
only. The block's input is one node over the input *and* the linears' parameters: it starts the sum, computes the
parameters' gradients while that is under way, and waits (Megatron-LM: ``gradient_accumulation_fusion`` and its
asynchronous all-reduce; here for all linears of a block together).

The linears hand the input's gradient to that node by themselves, and give none to autograd: what autograd brings may be
somebody else's, too, and would have to be copied before it is summed in place. (Where a script asks for this very
gradient, or for a second derivative, autograd brings it.)

Linears that read one input and whose weights lie back to back in one storage run as one: the first that is called
computes the outputs of all, and its siblings' are ready when those are called.

Both hold for the very tensor that entered the block, for plain parameters, and while gradients are recorded. Whatever
else a linear is called with (a hook's or an adapter's tensor, partitioned weights, under ``torch.compile``) takes the
layer's own forward; the ranks' collectives are the same either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.mesh.groups import Group, Pending
from tp_plugin.tensor import regions, sequence
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.forward import Forward, WrappedForward
from tp_plugin.tensor.sequence import Regather, Stack


class WeightGradTask(NamedTuple):
    """What a linear leaves for the gradients of its parameters.

    Attributes:
        task: the backward it belongs to.
        places: which linears of the block, concatenated in ``grad``, and how wide each is.
        transposed: whether their weights are (in, out).
        grad: the gradient of their output (…, out).
        x: their input, or what gathers it; None if no weight is trained.
    """

    task: int
    places: tuple[tuple[int, int], ...]
    transposed: bool
    grad: torch.Tensor
    x: torch.Tensor | Regather | None


@dataclasses.dataclass
class BlockRun:
    """One run of a block.

    Attributes:
        parameters: linear → its number, weight and bias as the input's node knows them.
        trained: whether these weights and biases want gradients, by number.
        entered: the tensors that entered.
        tasks: filled and emptied by each backward.
        given: the gradient of the one input by the backward it belongs to; likewise.
        regather: what gathers the input again in the backward, if autograd does not keep it whole.
        ready: outputs of linears that were computed with a sibling's.
    """

    parameters: dict[nn.Module, tuple[int, torch.Tensor, torch.Tensor | None]]
    trained: list[bool] = dataclasses.field(default_factory=list)
    entered: list[torch.Tensor] = dataclasses.field(default_factory=list)
    tasks: list[WeightGradTask] = dataclasses.field(default_factory=list)
    given: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    regather: Regather | None = None
    ready: dict[nn.Module, torch.Tensor] = dataclasses.field(default_factory=dict)


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

    def enter(self, xs: Sequence[torch.Tensor], stack: Stack | None) -> list[torch.Tensor]:
        """``f`` at all inputs of the block, or the gathering of its one input if that is a part of the sequence."""
        group = self.group
        self.run = None
        gathered = stack is not None and stack.runs
        parameters = self._parameters() if self._may_overlap(xs, group) else {}
        if not parameters:
            return [sequence.enter(xs[0], stack, group)] if gathered else regions.copy_all_to_tp(xs, group)
        run = BlockRun(parameters)
        span = stack.span(xs[0]) if stack is not None and gathered else None
        flat = [p for _, weight, bias in parameters.values() for p in (weight, bias)]
        run.trained = [p is not None and p.requires_grad for p in flat]
        run.entered = list(_BlockInput.apply(run.tasks, run.given, group, span, self.overlap, len(xs), *xs, *flat))
        self.run = run
        return run.entered

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

    def _parameters(self) -> dict[nn.Module, tuple[int, torch.Tensor, torch.Tensor | None]]:
        found: dict[nn.Module, tuple[int, torch.Tensor, torch.Tensor | None]] = {}
        for linear in self.linears:
            weight: Any = linear.weight
            bias: Any = linear.bias
            if _is_plain(weight) and (bias is None or _is_plain(bias)):
                found[linear] = len(found), weight, bias
        return found

    def output(self, linear: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The output of ``linear`` for ``x``; None if it has to compute that by itself."""
        run = self.run
        if run is None or linear not in run.parameters or id(x) not in map(id, run.entered):
            return None
        if linear in run.ready:
            return run.ready.pop(linear)
        together = self._siblings(linear, run) if self.fuse and len(run.entered) == 1 else (linear,)
        numbers, weights, biases = [], [], []
        for one in together:
            number, weight, bias = run.parameters[one]
            if one.weight is not weight or one.bias is not bias:
                return None
            numbers.append(number)
            weights.append(weight.detach())
            if bias is not None:
                biases.append(bias.detach())
        outputs = _Linears.apply(run, numbers, isinstance(linear, Conv1D), x, *weights, *biases)
        if len(together) == 1:
            return outputs[0]  # type: ignore[no-any-return]
        run.ready.update(zip(together, outputs, strict=True))
        return run.ready.pop(linear)

    def _siblings(self, linear: nn.Module, run: BlockRun) -> tuple[nn.Module, ...]:
        for siblings in self.siblings:
            if linear not in siblings or any(one not in run.parameters or _is_watched(one) for one in siblings):
                continue
            if len({run.parameters[one][1].requires_grad for one in siblings}) > 1:
                continue  # no gradient is computed for nothing
            if back_to_back([run.parameters[one][1] for one in siblings]) is not None:
                return siblings
        return (linear,)


def _is_plain(parameter: object) -> bool:
    return type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id")


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody may call it with another input than its siblings, or asks for its own gradients."""
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def back_to_back(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The weights (out, in), one below the other, if they lie so in one storage."""
    first = weights[0]
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        alike = weight.dtype == first.dtype and weight.shape[1:] == first.shape[1:] and weight.is_contiguous()
        if not alike or weight.data_ptr() != address or weight.untyped_storage().data_ptr() != storage:
            return None
        address += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def put_back_to_back(weights: Sequence[nn.Parameter]) -> None:
    """Make :func:`back_to_back` weights of some that lie in storages of their own; the Parameter objects stay."""
    with torch.no_grad():
        flat = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, flat.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part


class _BlockInput(torch.autograd.Function):
    """``f``, or the gathering of the tokens, and the parameters' gradients while its backward communicates."""

    @staticmethod
    def forward(
        ctx: Any,
        tasks: list[WeightGradTask],
        given: dict[int, torch.Tensor],
        group: Group,
        span: tuple[int, int] | None,
        overlap: bool,
        count: int,
        *all: Any,
    ) -> tuple[torch.Tensor, ...]:
        ctx.tasks, ctx.given, ctx.group, ctx.span, ctx.overlap, ctx.count = tasks, given, group, span, overlap, count
        xs, parameters = all[:count], all[count:]
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        ctx.set_materialize_grads(count > 1)
        if span is not None:
            return tuple(sequence.gather_tokens(x, *span, group) for x in xs)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first = 6 + ctx.count
        wanted = ctx.needs_input_grad[first:]
        ours = ctx.given.pop(torch._C._current_graph_task_id(), None)
        ctx.given.clear()
        if ours is None and grads[0] is None:  # nothing came, on no rank
            return (None,) * len(ctx.needs_input_grad)
        under_way = _start_sum(ctx, ours, grads)
        if not ctx.overlap:
            under_way.wait()
        found = _gradients(ctx.tasks, ctx.dtypes, wanted)
        summed = under_way.wait()
        if len(grads) > 1:
            parts = summed.split([grad.numel() for grad in grads])
            return *[None] * 6, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True)), *found
        return *[None] * 6, summed, *found


def _start_sum(ctx: Any, ours: torch.Tensor | None, grads: Sequence[torch.Tensor]) -> Pending:
    """Begin to sum the input's gradient: ``ours``, which nobody else knows, and what autograd has brought."""
    if len(grads) > 1:
        return ctx.group.start_all_reduce(torch.cat([grad.reshape(-1) for grad in grads]))  # type: ignore[no-any-return]
    (brought,) = grads
    total = brought if ours is None else ours if brought is None else ours.add_(brought)
    if ctx.span is not None:
        return sequence.start_reduce_scatter_tokens(total, ctx.span[0], ctx.group)
    # a copy of what is not ours: autograd may hand the same gradient to another consumer
    mine = total.clone(memory_format=torch.contiguous_format) if ours is None else total
    return ctx.group.start_all_reduce(mine)  # type: ignore[no-any-return]


def _gradients(
    tasks: list[WeightGradTask], dtypes: list[torch.dtype | None], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of (weight, bias) of every linear, from the tasks of this backward, which are used up."""
    task = torch._C._current_graph_task_id()
    mine = [one for one in tasks if one.task == task]
    tasks.clear()  # those of another backward came no further than to the linears
    found: list[torch.Tensor | None] = [None] * len(dtypes)

    def add(at: int, grad: torch.Tensor) -> None:
        grad = grad.to(dtypes[at])
        before = found[at]
        found[at] = grad if before is None else before + grad

    while mine:
        _, places, transposed, grad, x = mine.pop(0)
        grad = grad.reshape(-1, grad.shape[-1])
        widths = [width for _, width in places]
        if x is not None:
            whole = x.take() if isinstance(x, Regather) else x
            rows = whole.reshape(-1, whole.shape[-1]).to(grad.dtype)
            weight = rows.t() @ grad if transposed else grad.t() @ rows
            for (number, _), part in zip(places, weight.split(widths, 1 if transposed else 0), strict=True):
                if wanted[2 * number]:
                    add(2 * number, part)
        if any(wanted[2 * number + 1] for number, _ in places):
            for (number, _), part in zip(places, grad.sum(0).split(widths), strict=True):
                if wanted[2 * number + 1]:
                    add(2 * number + 1, part)
    return found


class _Linears(torch.autograd.Function):
    """Linears of one input; the backward leaves the parameters' gradients to the block's input."""

    @staticmethod
    def forward(
        ctx: Any,
        run: BlockRun,
        numbers: list[int],
        transposed: bool,
        x: torch.Tensor,
        *parameters: Any,
    ) -> tuple[torch.Tensor, ...]:
        count = len(numbers)
        weights, biases = parameters[:count], parameters[count:]
        trained = learns = False
        for number in numbers:
            trained |= run.trained[2 * number]
            learns |= run.trained[2 * number] or run.trained[2 * number + 1]
        ctx.tasks, ctx.transposed, ctx.dtype = run.tasks if learns else None, transposed, x.dtype
        ctx.trained, ctx.regather = trained, run.regather if trained else None
        watched = len(run.entered) > 1 or x._backward_hooks or x.retains_grad  # by somebody's hook on its gradient
        ctx.given = None if watched else run.given
        widths = [weight.shape[1 if transposed else 0] for weight in weights]
        ctx.places = tuple(zip(numbers, widths, strict=True))
        if ctx.regather is not None:
            ctx.regather.count()
        ctx.save_for_backward(*weights, *([x] if trained and ctx.regather is None else []))
        bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
        if transposed:  # one matrix by another: F.linear would copy the transposed weight
            flat = x.reshape(-1, x.shape[-1])
            y = torch.mm(flat, weights[0]) if bias is None else torch.addmm(bias, flat, weights[0])
            return (y.view(*x.shape[:-1], widths[0]),)
        if count == 1:
            return (F.linear(x, weights[0], bias),)
        return _cut(F.linear(x, _one(weights), bias), widths)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpoints give each tensor only once
        weights, x = saved[: len(ctx.places)], ctx.regather
        if ctx.regather is not None:
            ctx.regather.start()  # while the input's gradient is computed
        elif ctx.trained:
            x = saved[-1]
        grad = torch.cat(grads, -1) if len(grads) > 1 else grads[0]
        task = torch._C._current_graph_task_id()
        if ctx.tasks is not None:
            ctx.tasks.append(WeightGradTask(task, ctx.places, ctx.transposed, grad, x))
        weight = _one(weights).to(grad.dtype)
        back = grad.reshape(-1, grad.shape[-1]) @ (weight.t() if ctx.transposed else weight)
        back = back.to(ctx.dtype).view(*grad.shape[:-1], back.shape[-1])
        nothing = [None] * (len(ctx.needs_input_grad) - 4)
        ((block_input, _), *_) = ctx.next_functions
        if ctx.given is None or any([each.requires_grad for each in grads]) or not _runs(block_input):
            return *[None] * 3, back, *nothing
        before = ctx.given.get(task)
        ctx.given[task] = back if before is None else before.add_(back)
        return *[None] * 4, *nothing


def _runs(node: Any) -> bool:
    """Whether the backward that runs comes to what ``node`` computes, not only to a gradient it is asked for."""
    try:
        for behind, _ in node.next_functions:
            if behind is not None and torch._C._will_engine_execute_node(behind):
                return True
    except RuntimeError:
        return True  # a leaf behind it is asked for: of those torch does not say
    return False


def _one(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(weights) == 1:
        return weights[0]
    whole = back_to_back(weights)
    # somebody's hook on saved tensors may have given them storages of their own
    return torch.cat(list(weights)) if whole is None else whole


def _cut(y: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Columns of ``y`` as tensors that autograd does not know as views of one: each may be changed in place."""
    found, at = [], y.storage_offset()
    for width in widths:
        part = y.new_empty(0)
        found.append(part.set_(y.untyped_storage(), at, (*y.shape[:-1], width), y.stride()))
        at += width
    return tuple(found)


class ColumnParallelForward(WrappedForward):
    """The forward of a linear whose weight is split by output features: its own, unless its block's input computes it.

    Args:
        block_input: the input of the block.
    """

    def __init__(self, module: nn.Module, own: Forward, block_input: BlockInput):
        super().__init__(module, own)
        self.block_input = block_input

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The full input (…, in) → this rank's features (…, out / tp)."""
        if self.block_input.run is not None and not torch.compiler.is_compiling():
            y = self.block_input.output(self.module, x)
            if y is not None:
                return y
        return self.own(x)


def takes_overlap(linear: nn.Module) -> bool:
    """Whether ``linear`` computes what its class does; an architecture's own and patched ones stay as they are."""
    return type(linear) in (nn.Linear, Conv1D) and "forward" not in vars(linear)
