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
from tp_plugin.parallel import collectives, rng
from tp_plugin.parallel.mesh import Group, require_mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.policy.layout import Range


class ParallelBlock:
    """The two ends of one block: ``f`` at its inputs, and the random stream between there and its reduction.

    Args:
        path: the block's path in the model (it enters the seeds of its random stream).
        inputs: names of the forward's activation arguments.
        positions: position of every argument of the forward.
        tp_rank: this rank in the TP group.
        head_inputs: arguments with a dimension of heads → that dimension, the number of heads, this rank's range.
    """

    def __init__(
        self,
        path: str,
        inputs: tuple[str, ...],
        positions: dict[str, int],
        tp_rank: int,
        head_inputs: Mapping[str, tuple[int, int, Range]] | None = None,
    ):
        self.inputs, self.positions, self.head_inputs = inputs, positions, head_inputs or {}
        self.region = rng.ShardedRegion(path, tp_rank)
        self._probabilities: list[tuple[Any, str]] | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook (with kwargs) of the block's module."""
        group = require_mesh().tp
        values, named = list(args), dict(kwargs)
        device = None
        for name in self.inputs:
            holder: Any = named if name in named else values
            key: Any = name if name in named else self.positions[name]
            if (holder is named or key < len(values)) and isinstance(holder[key], torch.Tensor):
                device = holder[key].device
                holder[key] = collectives.enter(holder[key], group)
        for name, (dim, heads, (start, stop)) in self.head_inputs.items():
            holder = named if name in named else values
            key = name if name in named else self.positions[name]
            if (holder is named or key < len(values)) and isinstance(holder[key], torch.Tensor):
                tensor = collectives.enter(holder[key], group)
                holder[key] = (
                    tensor.unflatten(dim, (-1, heads)).narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)
                )
        if module.training and device is not None and self._draws(module):
            self.region.begin(device)
        return tuple(values), named

    def enter_linear(self, block: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the column-parallel module at which a block begins that is no module of its own."""
        entered = collectives.enter(args[0], require_mesh().tp)
        if block.training and self._draws(block):
            self.region.begin(entered.device)
        return (entered, *args[1:])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook (always called): a block that raised must not leave the sharded random stream on."""
        self.region.end()

    def _draws(self, module: nn.Module) -> bool:
        # a Dropout module, or a probability by its name (attention_dropout, attn_pdrop), here or in the config
        if self._probabilities is None:
            self._probabilities = [
                (owner, name)
                for owner in (*module.modules(), getattr(module, "config", module))
                for name, value in vars(owner).items()
                if isinstance(value, float | int)
                and ("drop" in name or (name == "p" and "Drop" in type(owner).__name__))
            ]
        return any(getattr(owner, name) > 0 for owner, name in self._probabilities)


class AdapterDropout:
    """Hooks of a dropout beside a sharded linear: its random stream is the one its input asks for.

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
                self.block.region.pause()

    def after(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        """Forward hook (always called)."""
        if module.training:
            if self.kind == "sharded":
                self.own.end()
            else:
                self.block.region.resume()


class _RowParallel:
    """Mixin: local product, then ``g``, then the bias, which every rank holds whole and adds once."""

    tp_block: ParallelBlock
    bias: Any
    _product: Any  # the local part of the product, by the kind of layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self._product(x)
        self.tp_block.region.end()
        y = collectives.reduce(product, require_mesh().tp)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RowParallelLinear(_RowParallel, nn.Linear):
    """``nn.Linear`` whose weight (out, in) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class RowParallelConv1D(_RowParallel, Conv1D):
    """``Conv1D`` whose weight (in, out) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t())


ROW_PARALLEL = {nn.Linear: RowParallelLinear, Conv1D: RowParallelConv1D}


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

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop
        self._elsewhere: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Token ids → local rows; ids of other ranks' rows read row 0 and are blanked afterwards."""
        ids = args[0]
        elsewhere = (ids < self.start) | (ids >= self.stop)
        self._elsewhere.append(elsewhere)
        return ((ids - self.start).masked_fill(elsewhere, 0), *args[1:])

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' rows, of which one is not blank: the embeddings of all ids."""
        blank = output.masked_fill(self._elsewhere.pop().unsqueeze(-1), 0)
        return collectives.reduce(blank, require_mesh().tp)


class VocabularyColumns:
    """Hooks of an output head that computes this rank's logits."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``f`` at the head's input."""
        return (collectives.enter(args[0], require_mesh().tp), *args[1:])

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Local logits (…, rows) → whole logits (…, vocabulary) on every rank, padding dropped."""
        return collectives.gather_last(output, require_mesh().tp)[..., : self.vocabulary]


Piece = tuple[Group, int | None, tuple[tuple[int, int], ...]]
"""A group, and the local ranges of a dimension that its ranks share (None: the whole tensor)."""


class ReplicaSum:
    """Tensor hook on a parameter: sum the gradient of replicated elements over the ranks that share them.

    It runs once per backward, on that backward's gradient and before it is accumulated, so accumulation over
    micro-batches stays right, and DDP and ZeRO see the sum.
    """

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces

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
