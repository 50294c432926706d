"""Linears that are split: what stands in the place of their forwards.

Row-parallel ones are the layer's own forward without its bias on this rank's input features, then the reduction. That
wraps any linear (``nn.Linear``, ``Conv1D``, an architecture's own, a quantized or an adapted one). Column-parallel ones
are the layer's own forward, or what the block's input computes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.policy import ParamLayout
from tp_plugin.tensor import int8_rows
from tp_plugin.tensor.block import ParallelBlock
from tp_plugin.tensor.forward import Forward, WrappedForward, runs_as, without_bias
from tp_plugin.tensor.wgrad_overlap import BlockInput


class RowParallelForward(WrappedForward):
    """The forward of a linear whose weight is split by input features: local product, ``g``, then the bias, once.

    Args:
        block: the block that ends here.
        margins: of weights in codes that hold more than this rank's features, where (packed.py).

    Attributes:
        keeps: an adapter around the linear adds something to the product, and sums it (:meth:`sum`).
    """

    keeps = False

    def __init__(
        self, module: nn.Module, own: Forward, block: ParallelBlock, margins: tuple[tuple[int, int, int], ...] = ()
    ):
        super().__init__(module, own)
        self.block, self.margins = block, margins

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This rank's features (…, in / tp) → the full output (…, out)."""
        module: Any = self.module
        self.block.region.end()  # nothing split is dropped any more, and recomputation may stop inside of the product
        if self.keeps:
            return self._product(x, *args, **kwargs)
        bias: torch.Tensor | None = getattr(module, "bias", None)  # every rank holds all of it
        if runs_as(self.own, nn.Linear):  # (a product with a name would be kept beside the sum)
            return self.block.reduce(F.linear(x, module.weight), bias, fresh=True)
        return self.block.reduce(self._product(x, *args, **kwargs), bias, runs_as(self.own, Conv1D))

    def _product(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module: Any = self.module
        if runs_as(self.own, nn.Linear):
            return F.linear(x, module.weight)
        if runs_as(self.own, Conv1D):
            # one matrix by another: F.linear would copy the transposed weight, and keep the copy for the backward
            flat = torch.mm(x.reshape(-1, x.shape[-1]), module.weight)
            matrix: torch.Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])
            return matrix  # no view to autograd
        if self.margins:  # zeros for the features of other ranks that share a block of codes with this one's
            ranges = torch.split(x, [length for length, _, _ in self.margins], -1)
            padded = [F.pad(own, around) for own, (_, *around) in zip(ranges, self.margins, strict=True)]
            x = padded[0] if len(padded) == 1 else torch.cat(padded, -1)
        with without_bias(module):
            if int8_rows.quantizes_input(module, x):
                return int8_rows.product(module, x, self.block.group)
            product: torch.Tensor = self.own(x, *args, **kwargs)
            return product

    def sum(self, product: torch.Tensor, fresh: bool) -> torch.Tensor:
        """``g`` behind this rank's product, and the bias (of which every rank holds all), once."""
        return self.block.reduce(product, getattr(self.module, "bias", None), fresh)


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


def fit_sizes(module: nn.Module, layout: ParamLayout, rank: int) -> None:
    """Make the feature counts that a linear layer carries those of its local weight."""
    shape = layout.local_shape(rank)
    if isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
