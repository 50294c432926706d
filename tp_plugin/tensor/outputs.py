"""What a model returns of its layers: attention weights of all heads, hidden states of all tokens.

Layers hold this rank's heads and, with sequence parallelism, this rank's tokens. Where the script asks for them
(``output_attentions``, ``output_hidden_states``) they are gathered, at the model that is nearest to the layers. Every
rank computes the same from what is gathered, so the gradient of its own part is its share of that of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.policy.layout import Parts
from tp_plugin.tensor import regions
from tp_plugin.tensor.sequence import SEQUENCE, Join, Stack

HEADS = 1
"""The dimension of the heads in attention weights (batch, heads, queries, keys)."""


class LayerOutputs:
    """Forward hook of a model.

    Args:
        heads: the query heads of each rank in the layers of this model; different ones are not known how to gather.
        stacks: its stacks of layers whose tokens are split.
        group: the TP group.
    """

    def __init__(self, heads: Sequence[Parts], stacks: Sequence[Stack], group: Group):
        self.heads, self.stacks, self.group = tuple(dict.fromkeys(heads)), tuple(stacks), group

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._whole(module, "", value) for value in output)
        if hasattr(output, "items"):
            for name, value in list(output.items()):
                if name.endswith(("attentions", "hidden_states")):
                    whole = self._whole(module, name, value)
                    if whole is not value:
                        output[name] = whole
        return output

    def _whole(self, module: nn.Module, name: str, value: Any) -> Any:
        """``value``, with what it has of each layer made whole; in a plain tuple the shapes say what it is."""
        if not isinstance(value, tuple) or not value or not all(v is None or torch.is_tensor(v) for v in value):
            return value
        dims = {tensor.dim() for tensor in value if tensor is not None}
        if self.heads and (name.endswith("attentions") or (not name and dims == {4})):
            return tuple(self._all_heads(module, tensor) for tensor in value)
        if self.stacks and (name.endswith("hidden_states") or (not name and dims == {3})):
            return tuple(self._all_tokens(tensor, at + 1 < len(value)) for at, tensor in enumerate(value))
        return value

    def _all_heads(self, module: nn.Module, weights: torch.Tensor | None) -> torch.Tensor | None:
        if weights is None:
            return None
        tp = self.group
        held = [[head for a, b in part for head in range(a, b)] for part in self.heads[0]]
        counts = [len(heads) for heads in held]
        if len(self.heads) > 1 or weights.dim() != 4 or weights.shape[HEADS] != counts[tp.rank]:
            raise TPError(
                f"attention weights of {type(module).__name__} have the shape {tuple(weights.shape)}, in which the "
                "heads of a rank cannot be told; run it without output_attentions, or with tp_size: 1"
            )
        most = max(counts)
        last = F.pad(weights.transpose(HEADS, -1), (0, most - counts[tp.rank])).contiguous()
        gathered = regions.gather_from_tp(last, tp)
        whole = torch.cat([gathered.narrow(-1, most * rank, count) for rank, count in enumerate(counts)], -1)
        order = [head for heads in held for head in heads]
        if order != sorted(order):
            whole = whole[..., torch.tensor(order, device=whole.device).argsort()]
        return whole.transpose(HEADS, -1)

    def _all_tokens(self, states: torch.Tensor | None, between: bool) -> torch.Tensor | None:
        # the last states are joined, unless the script's hooks are older than ours; a single token has one shape always
        if states is None or states.dim() != 3:
            return states
        for stack in self.stacks:
            own = -(-stack.length // self.group.size)
            if stack.ran and states.shape[SEQUENCE] == own and (own != stack.length or between):
                whole: torch.Tensor = Join.apply(states, stack, stack.length)
                return whole
        return states
