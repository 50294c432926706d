"""Sharded layers. Column-parallel layers are the model's own, with less weight; the others change class or get hooks.

A class changed in place (as FSDP2 does) keeps the module object, its hooks, its name and its parameters' names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.parallel import collectives, rng
from tp_plugin.parallel.mesh import Group, require_mesh
from tp_plugin.policy import ParamLayout


class BlockState:
    """What the ends of one block share: the inputs' names and the random stream between them."""

    def __init__(self, path: str, inputs: tuple[str, ...], tp_rank: int, positions: dict[str, int]):
        self.inputs, self.positions = inputs, positions
        self.region = rng.ShardedRegion(path, tp_rank)


class _RowParallel:
    """Mixin: local product, then ``g``, then the bias, which every rank holds whole and adds once."""

    tp_block: BlockState

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self._product(x)
        self.tp_block.region.end()
        y = collectives.reduce(product, require_mesh().tp)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # type: ignore[attr-defined]


class RowParallelLinear(_RowParallel, nn.Linear):
    """``nn.Linear`` whose weight (out, in) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class RowParallelConv1D(_RowParallel, Conv1D):
    """``Conv1D`` whose weight (in, out) is split by input features."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t())


ROW_PARALLEL = {nn.Linear: RowParallelLinear, Conv1D: RowParallelConv1D}


def fit_sizes(module: nn.Module, layout: ParamLayout, rank: int) -> None:
    """Make the feature counts that a linear layer carries those of its local weight."""
    shape = layout.local_shape(rank)
    if isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape


def block_pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """``f`` at the activation inputs of a block, and the switch to the sharded random stream."""
    state: BlockState = module.tp_block  # type: ignore[assignment]
    group = require_mesh().tp
    values, named = list(args), dict(kwargs)
    device = None
    for name in state.inputs:
        at = state.positions[name]
        holder: Any = named if name in named else values if at < len(values) else None
        key: Any = name if name in named else at
        if holder is not None and isinstance(holder[key], torch.Tensor):
            device = holder[key].device
            holder[key] = collectives.enter(holder[key], group)
    if module.training and device is not None and require_dropout(module):
        state.region.begin(device)
    return tuple(values), named


def block_hook(module: nn.Module, args: Any, output: Any) -> None:
    """The end of the block, also when it raised: never leave the sharded random stream on."""
    module.tp_block.region.end()  # type: ignore[union-attr]


def require_dropout(module: nn.Module) -> bool:
    """Whether anything below ``module`` can draw random numbers in training: a Dropout, or a probability by name."""
    probabilities = module.__dict__.get("tp_dropout")
    if probabilities is None:
        probabilities = [
            (owner, name)
            for owner in (*module.modules(), getattr(module, "config", module))
            for name, value in vars(owner).items()
            if isinstance(value, float | int) and ("drop" in name or (name == "p" and _is_dropout(owner)))
        ]
        module.__dict__["tp_dropout"] = probabilities
    return any(getattr(owner, name) > 0 for owner, name in probabilities)


def _is_dropout(module: nn.Module) -> bool:
    return "dropout" in type(module).__name__.lower()


def embedding_pre_hook(module: nn.Embedding, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Global token ids → local rows; ids of other ranks' rows read row 0 and are blanked afterwards."""
    ids = args[0]
    start, stop = module.tp_rows
    elsewhere = (ids < start) | (ids >= stop)
    module.tp_elsewhere = elsewhere
    return ((ids - start).masked_fill(elsewhere, 0), *args[1:])


def embedding_hook(module: nn.Embedding, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Sum the ranks' rows, of which one is not blank: the embeddings of all ids."""
    elsewhere, module.tp_elsewhere = module.tp_elsewhere, None
    return collectives.reduce(output.masked_fill(elsewhere.unsqueeze(-1), 0), require_mesh().tp)


def head_pre_hook(module: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``f`` at the input of the vocabulary-parallel head."""
    return (collectives.enter(args[0], require_mesh().tp), *args[1:])


def head_hook(module: nn.Linear, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Local logits (…, rows) → whole logits (…, vocabulary) on every rank, padding dropped."""
    return collectives.gather_last(output, require_mesh().tp)[..., : module.tp_vocabulary]


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
            for view, part in zip(views, summed.split([b - a for a, b in ranges], dim), strict=True):
                view.copy_(part)
        return grad
