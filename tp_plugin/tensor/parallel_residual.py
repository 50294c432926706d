"""Attention and MLP side by side, x + attention(a) + mlp(b) (GPT-J, NeoX, Falcon, Phi, Cohere): one sum for both.

The first block keeps back its part of its output and gives zeros; the second one's all-reduce sums the parts of both.
Where both blocks have one input, its gradient is summed once, too. Exact as long as the layer does nothing with the
outputs but add them up: where a dropout draws, or somebody else's hook looks at an output, each block sums its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
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
        beginning: that of both blocks.
    """

    def __init__(self, path: str, outputs: Sequence[nn.Module], beginning: BlockInput, stack: Stack | None = None):
        self.path, self.outputs, self.beginning, self.stack = path, list(outputs), beginning, stack
        self._draws = Dropouts(besides=INSIDE)
        self.own_hooks = sum(len(module._forward_hooks) for module in outputs)
        self.merging = False
        self._input: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def begin(self, layer: nn.Module, args: Any) -> None:
        """Forward pre-hook of the layer."""
        watched = sum(len(module._forward_hooks) for module in self.outputs) > self.own_hooks
        self.merging = not watched and not (layer.training and self._draws(layer))
        self._input = self._kept = None

    def end(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layer (always called)."""
        kept, self._input, self._kept = self._kept, None, None
        self.beginning.end()
        if kept is not None and output is not None:
            raise TPError(
                f"{self.path} ran only one of the two blocks that its policy pairs; remove parallel_residual from the "
                "policy"
            )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """``f`` at the input of a block; the same tensor, entered before, is not entered again."""
        if self._input is not None and self._input[0] is x:
            return self._input[1]
        (entered,) = self.beginning.enter([x], self.stack)
        self._input = x, entered
        return entered

    def reduce(self, product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``g`` and the bias after a row-parallel product: zeros at the first call, the sum for both at the second."""
        if self._kept is None:
            self._kept = product, bias
            return sequence.zeros(product, self.stack)
        (other, other_bias), self._kept = self._kept, None
        y = sequence.reduce(product + other, self.stack)
        for b in (bias, other_bias):
            y = y if b is None else y + b.to(y.dtype)
        return y
