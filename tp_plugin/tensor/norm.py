"""RMS norm over a width that is split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.policy.layout import Range
from tp_plugin.tensor import regions
from tp_plugin.tensor.forward import Forward, WrappedForward


class TPRMSNorm(WrappedForward):
    """y = w · x / sqrt(mean(x²) + ε) (Zhang and Sennrich 2019), the mean taken over all ranks, each element once.

    One all-reduce of one number per token in the forward and one in the backward.

    Args:
        module: an RMS norm with ``weight`` and ``variance_epsilon``.
        width: elements of the full width.
        owned: ranges of this rank's elements that no rank before it holds.
        group: the TP group.
    """

    def __init__(self, module: nn.Module, own: Forward, width: int, owned: tuple[Range, ...], group: Group):
        super().__init__(module, own)
        if not hasattr(module, "variance_epsilon"):
            raise TPError(f"{type(module).__name__} is not an RMS norm (it has no variance_epsilon)")
        self.width, self.owned, self.group = width, owned, group

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This rank's elements (…, width / tp) → the same, normalised over the full width."""
        module: Any = self.module
        x = hidden_states.to(torch.float32)
        mine = torch.cat([x[..., a:b] for a, b in self.owned], dim=-1) if self.owned else x[..., :0]
        squares = mine.pow(2).sum(-1, keepdim=True)
        # every rank uses the sum on its own share, so its gradient is the ranks' sum
        total = regions.copy_to_tp(regions.reduce_from_tp(squares, self.group, fresh=True), self.group)
        scaled: torch.Tensor = module.weight * (x * torch.rsqrt(total / self.width + module.variance_epsilon))
        return scaled.to(hidden_states.dtype)
