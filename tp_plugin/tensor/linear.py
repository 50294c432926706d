"""Row-parallel linear layers, and the feature counts of linears that hold a shard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.policy import ParamLayout
from tp_plugin.tensor import sequence
from tp_plugin.tensor.block import ParallelBlock
from tp_plugin.tensor.parallel_residual import ParallelResidual


class _RowParallel:
    """Mixin: local product, then ``g``, then the bias, which every rank holds whole and adds once."""

    tp_block: ParallelBlock
    tp_beside: ParallelResidual | None = None
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


def fit_sizes(module: nn.Module, layout: ParamLayout, rank: int) -> None:
    """Make the feature counts that a linear layer carries those of its local weight."""
    shape = layout.local_shape(rank)
    if isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
