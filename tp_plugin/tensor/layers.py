"""Sharded layers. Column-parallel layers are the model's own, with less weight; the others change class or get hooks.

A class changed in place (as FSDP2 does) keeps the module object, its hooks, its name and its parameters' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import TPError
from tp_plugin.tensor import regions as collectives, rng, sequence
from tp_plugin.tensor.wgrad_overlap import Beginning
from tp_plugin.mesh.groups import Group, require_mesh
from tp_plugin.tensor.parallel_residual import SideBySide
from tp_plugin.policy import BlockPlan, ParamLayout
from tp_plugin.policy.layout import Range


class ParallelBlock:
    """The two ends of one block: ``f`` at its inputs, and the random stream between there and its reduction.

    Args:
        path: the block's path in the model (it enters the seeds of its random stream).
        plan: how the block communicates.
        positions: position of every argument of the forward of the block's entry.
        tp_rank: this rank in the TP group.
    """

    def __init__(self, path: str, plan: BlockPlan, positions: dict[str, int], tp_rank: int):
        self.plan, self.positions, self.tp_rank = plan, positions, tp_rank
        self.region = rng.ShardedRegion(path, tp_rank)
        self.beginning = Beginning()
        self.beside: SideBySide | None = None
        self.stack: sequence.Stack | None = None
        self.layer_region: rng.ShardedRegion | None = None
        self.regather: sequence.Regather | None = None
        self._draws = rng.Dropouts()
        self._to_come = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook (with kwargs) of the block's entry."""
        group = require_mesh().tp
        arguments = _Arguments(args, kwargs, self.positions)
        inputs = {name: arguments.tensor(name) for name in self.plan.inputs}
        entering = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if self.beside is not None and len(entering) == 1:
            entered = [self.beside.enter(tensor) for tensor in entering.values()]
        elif self.on_parts:
            first, *others = entering.values()  # a cross-attention's other input is whole
            entered = [self._gather(first), *collectives.enter_all(others, group)]
        else:
            entered = self.beginning.enter(list(entering.values()), None)
        for name, tensor in zip(entering, entered, strict=True):
            arguments.put(name, tensor)
        for name, (dim, heads, ranges) in self.plan.head_inputs.items():
            bias = arguments.tensor(name)
            if bias is not None:
                (start, stop), at = ranges[self.tp_rank], bias.dim() + dim
                mine = collectives.enter(bias, group)
                if mine.shape[at] > 1:  # else one for all heads
                    mine = mine.unflatten(at, (-1, heads)).narrow(at + 1, start, stop - start).flatten(at, at + 1)
                arguments.put(name, mine)
        if self.plan.experts is not None:
            self._part_experts(arguments, *self.plan.experts)
        if entering:
            self._begin(module, next(iter(entering.values())).device)
        return tuple(arguments.args), arguments.kwargs

    def _part_experts(self, arguments: _Arguments, name: str, ranges: tuple[Range, ...]) -> None:
        """Experts' numbers → this rank's; those of other ranks become the number after the last, which is no expert."""
        numbers = arguments.tensor(name)
        assert numbers is not None
        start, stop = ranges[self.tp_rank]
        elsewhere = (numbers < start) | (numbers >= stop)
        arguments.put(name, (numbers - start).masked_fill(elsewhere, stop - start))

    def start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a block's module that begins at modules below."""
        self._to_come = len(self.plan.input_of) + len(self.plan.output_of)

    def enter_linear(self, block: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a module below at whose input the block begins."""
        return (self._enter_below(block, args[0]), *args[1:])

    def enter_output(self, block: nn.Module, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a module below at whose output the block begins."""
        return self._enter_below(block, output)

    def _enter_below(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self._to_come -= 1
        if self._to_come <= 0:  # what runs before the last of several beginnings is replicated
            self._begin(block, x.device)
        if len(self.plan.input_of) + len(self.plan.output_of) > 1:
            return sequence.enter(x, self.stack)
        if self.on_parts and self.plan.input_of:
            return self._gather(x)
        return self.beginning.enter([x], self.stack)[0]

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        assert self.stack is not None
        (entered,) = self.beginning.enter([x], self.stack)
        self.regather = self.stack.keep(x, entered)
        if self.beginning.opening is not None:
            self.beginning.opening.regather = self.regather
        return entered

    def _begin(self, module: nn.Module, device: torch.device) -> None:
        # on parts of the sequence the whole layer has this rank's own random stream
        if module.training and not self.on_parts and self._draws(module):
            self.region.begin(device)

    @property
    def on_parts(self) -> bool:
        """Whether this rank has a part of the tokens outside of the block."""
        return self.stack is not None and self.stack.runs

    @property
    def stream(self) -> rng.ShardedRegion:
        """The random stream that the inside of the block draws from."""
        return self.layer_region if self.on_parts and self.layer_region is not None else self.region

    def sum_output(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a module whose output is this rank's part of a sum."""
        self.end()
        return sequence.reduce(output, self.stack)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook (always called): a block that raised must not leave the sharded random stream on."""
        self.end()

    def end(self) -> None:
        """Behind the block's sharded part."""
        self.region.end()
        if self.beside is None:
            self.beginning.end()
        if self.regather is not None:
            self.regather.end()
            self.regather = None


class _Arguments:
    """A call's arguments, by the names they have in the signature."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: dict[str, int]):
        self.args, self.kwargs, self.positions = list(args), dict(kwargs), positions

    def tensor(self, name: str) -> torch.Tensor | None:
        """The argument, if it was given and is a tensor."""
        at = self.positions[name]
        value = self.kwargs.get(name, self.args[at] if at < len(self.args) else None)
        return value if isinstance(value, torch.Tensor) else None

    def put(self, name: str, value: torch.Tensor) -> None:
        """Replace an argument that was given."""
        if name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.args[self.positions[name]] = value


class FollowingDropout:
    """Hooks of a dropout inside a block or beside a sharded linear: its random stream is the one its input asks for.

    A column-parallel layer's adapter drops from a replicated input inside the block's sharded stretch; a row-parallel
    layer's drops from this rank's share after that stretch has ended at the base layer's reduction.
    """

    def __init__(self, path: str, kind: str, block: ParallelBlock, tp_rank: int):
        self.kind, self.block = kind, block
        self.own = rng.ShardedRegion(path, tp_rank)

    def before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook."""
        if module.training:
            if self.kind == "sharded":
                self.own.begin(args[0].device)
            else:
                self.block.stream.pause()

    def after(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        """Forward hook (always called)."""
        if module.training:
            if self.kind == "sharded":
                self.own.end()
            else:
                self.block.stream.resume()


class _RowParallel:
    """Mixin: local product, then ``g``, then the bias, which every rank holds whole and adds once."""

    tp_block: ParallelBlock
    tp_beside: SideBySide | None = None
    bias: Any
    _product: Any  # the local part of the product, by the kind of layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self._product(x)
        self.tp_block.end()
        if self.tp_beside is not None and self.tp_beside.merging:
            return self.tp_beside.reduce(product, self.bias)
        y = sequence.reduce(product, self.tp_block.stack)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RowParallelLinear(_RowParallel, nn.Linear):
    """``nn.Linear`` whose weight (out, in) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class RowParallelConv1D(_RowParallel, Conv1D):
    """``Conv1D`` whose weight (in, out) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # one matrix by another: F.linear would copy the transposed weight, and keep the copy for the backward
        return torch.mm(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


ROW_PARALLEL = {nn.Linear: RowParallelLinear, Conv1D: RowParallelConv1D}


def part_biases(module: nn.Module, biases: Mapping[str, tuple[Range, int]]) -> None:
    """Make biases of a module whose outputs are summed over the ranks count once.

    Each rank holds a range of the last dimension. What the forward reads under the bias's name has zeros around that
    range, so that the ranks' sum is the whole bias. A property of the class, so that ZeRO-3 has gathered the parameter
    by the time it is read.

    Args:
        biases: name → this rank's range of the last dimension, and that dimension's whole size.
    """

    def reader(name: str, start: int, stop: int, size: int) -> property:
        def read(self: Any) -> torch.Tensor:
            mine: torch.Tensor = self._parameters[name]
            return F.pad(mine, (start, size - stop)) if self.tp_running else mine

        return property(read)

    properties = {name: reader(name, *mine, size) for name, (mine, size) in biases.items()}
    module.__class__ = type(type(module).__name__, (type(module),), {**properties, "tp_running": False})
    module.register_forward_pre_hook(_running)
    module.register_forward_hook(_not_running, always_call=True)


def _running(module: Any, args: Any) -> None:
    module.tp_running = True


def _not_running(module: Any, args: Any, output: Any) -> None:
    module.tp_running = False


class WideNorm:
    """RMS norm over a width that is split: the mean of squares is taken over all ranks, each element once.

    One all-reduce of one number per token in the forward and one in the backward.
    """

    def __init__(self, module: Any, width: int, owned: tuple[Range, ...]):
        self.module, self.width, self.owned = module, width, owned

    @staticmethod
    def install(module: nn.Module, width: int, owned: tuple[Range, ...]) -> None:
        """Replace the forward of ``module``, an RMS norm with ``weight`` and ``variance_epsilon``."""
        if not hasattr(module, "variance_epsilon"):
            raise TPError(f"{type(module).__name__} is no RMS norm (it has no variance_epsilon)")
        module.forward = WideNorm(module, width, owned)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        group = require_mesh().tp
        x = hidden_states.to(torch.float32)
        mine = torch.cat([x[..., a:b] for a, b in self.owned], dim=-1) if self.owned else x[..., :0]
        squares = mine.pow(2).sum(-1, keepdim=True)
        # every rank uses the sum on its own share, so its gradient is the ranks' sum
        mean = collectives.enter(collectives.reduce(squares, group), group) / self.width
        scaled: torch.Tensor = self.module.weight * (x * torch.rsqrt(mean + self.module.variance_epsilon))
        return scaled.to(hidden_states.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> WideNorm:
        return WideNorm(memo[id(self.module)], self.width, self.owned)


def fit_sizes(module: nn.Module, layout: ParamLayout, rank: int) -> None:
    """Make the feature counts that a linear layer carries those of its local weight."""
    shape = layout.local_shape(rank)
    if isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape


class VocabularyRows:
    """Hooks of an embedding that holds the rows ``[start, stop)`` of the vocabulary."""

    def __init__(self, start: int, stop: int, padding: int | None):
        self.start, self.stop, self.whole_padding = start, stop, padding
        inside = padding is not None and start <= padding < stop
        self.padding = padding - start if padding is not None and inside else None
        self._elsewhere: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Token ids → local rows; ids of other ranks' rows read row 0 and are blanked afterwards."""
        module.padding_idx = self.padding  # type: ignore[assignment]
        return (self.local(args[0]), *args[1:])

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' rows, of which one is not blank: the embeddings of all ids."""
        module.padding_idx = self.whole_padding  # type: ignore[assignment]
        return self.summed(output)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Numbers of this rank's rows."""
        elsewhere = (ids < self.start) | (ids >= self.stop)
        self._elsewhere.append(elsewhere)
        return (ids - self.start).masked_fill(elsewhere, 0)

    def summed(self, output: torch.Tensor) -> torch.Tensor:
        """The rows of the ids last given to :meth:`local`, from those of the ranks."""
        blank = output.masked_fill(self._elsewhere.pop().unsqueeze(-1), 0)
        return collectives.reduce(blank, require_mesh().tp)


class AdaptedRows:
    """The look-up in a LoRA adapter of an embedding (PEFT's ``Embedding._embed``), whose rows are split likewise.

    One all-reduce of r numbers per token in the forward.
    """

    def __init__(self, rows: VocabularyRows):
        self.rows = rows

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor, **hooks: Any) -> torch.Tensor:
        return self.rows.summed(F.embedding(self.rows.local(ids), weight, padding_idx=self.rows.padding))


Piece = tuple[Group, int | None, tuple[tuple[int, int], ...]]
"""A group, and the local ranges of a dimension that its ranks share (None: the whole tensor)."""


class ReplicaSum:
    """Tensor hook on a parameter: sum the gradient of replicated elements over the ranks that share them.

    It runs once per backward, on that backward's gradient and before it is accumulated, so accumulation over
    micro-batches stays right, and DDP and ZeRO see the sum.
    """

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces

    def arm(self, parameter: Any) -> None:
        """Hook ``parameter``, and let it say so: whoever puts another leaf in its place arms that one."""
        # a leaf takes a hook only while it requires grad; it keeps the hook when it is frozen and thawed
        trained = parameter.requires_grad
        parameter.requires_grad_(True)
        parameter.register_hook(self)
        parameter.requires_grad_(trained)
        parameter.tp_replica_sum = self

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        for group, dim, ranges in self.pieces:
            if dim is None:
                group.all_reduce(grad)
                continue
            views = [grad.narrow(dim, a, b - a) for a, b in ranges]
            summed = group.all_reduce(torch.cat(views, dim))
            for view, part in zip(views, torch.split(summed, [b - a for a, b in ranges], dim), strict=True):
                view.copy_(part)
        return grad
