"""A parallel residual, x + attention(a) + mlp(b) (GPT-J, NeoX, Falcon, Phi, Cohere): one all-reduce for both blocks.

The first block keeps its partial output back and gives zeros; the second one's all-reduce sums the partial outputs of
both. Where both blocks have one input, its gradient is summed once, too. Exact as long as the layer does nothing with
the outputs but add them up: where a dropout draws, somebody else's hook looks at an output, or an adapter stands beside
a row-parallel layer, each block sums its own.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.tensor import sequence
from tp_plugin.tensor.rng import Dropouts
from tp_plugin.tensor.sequence import Stack
from tp_plugin.tensor.wgrad_overlap import BlockInput

INSIDE = ("attention_dropout", "attn_dropout", "attn_pdrop")
"""Dropouts that act inside a block, on shards."""


class ParallelResidual:
    """The state of one layer's forward.

    Args:
        path: the layer's path, for messages.
        outputs: the modules whose outputs are not what they give when a layer runs merged: both blocks and their
            row-parallel layers.
        block_input: that of both blocks.
        group: the TP group.
        our_hooks: ids of the handles of the hooks that this plugin has put on modules.
        adapted: whether adapters read what a row-parallel layer gives, or sum a product of their own.
    """

    def __init__(
        self,
        path: str,
        outputs: Sequence[nn.Module],
        block_input: BlockInput,
        group: Group,
        our_hooks: Set[int],
        adapted: bool = False,
    ):
        self.path, self.outputs, self.block_input, self.group = path, list(outputs), block_input, group
        self.our_hooks, self.adapted = our_hooks, adapted
        self.stack: Stack | None = None
        self._draws = Dropouts(besides=INSIDE)
        self.merging = False
        self._input: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def begin(self, layer: nn.Module, args: Any) -> None:
        """Forward pre-hook of the layer."""
        draws = layer.training and self._draws(layer)
        self.merging = not draws and not self.adapted and not any(map(self._is_watched, self.outputs))
        self._input = self._kept = None

    def _is_watched(self, module: nn.Module) -> bool:
        """Whether somebody else looks at what ``module`` gives, or at its gradient."""
        theirs = any(number not in self.our_hooks for number in module._forward_hooks)
        return theirs or bool(module._backward_hooks or module._backward_pre_hooks)

    def end(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layer (always called)."""
        kept, self._input, self._kept = self._kept, None, None
        self.block_input.end()
        if kept is not None and output is not None:
            raise TPError(
                f"{self.path} ran only one of the two blocks that its policy pairs; remove parallel_residual from the "
                "policy"
            )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """``f`` at the input of a block; the same tensor, entered before, is not entered again."""
        if self._input is not None and self._input[0] is x:
            return self._input[1]
        (entered,) = self.block_input.enter([x], self.stack)
        self._input = x, entered
        return entered

    def reduce(self, product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``g`` and the bias after a row-parallel product: zeros at the first call, the sum for both at the second."""
        if self._kept is None:
            self._kept = product, bias
            return sequence.zeros(product, self.stack)
        (other, other_bias), self._kept = self._kept, None
        y = sequence.reduce(product + other, self.stack, self.group, fresh=True)
        for b in (bias, other_bias):
            y = y if b is None else y + b.to(y.dtype)
        return y
