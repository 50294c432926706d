"""RMS norm over a width that is split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import require_mesh
from tp_plugin.policy.layout import Range
from tp_plugin.tensor import regions


class TPRMSNorm:
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
        module.forward = TPRMSNorm(module, width, owned)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        group = require_mesh().tp
        x = hidden_states.to(torch.float32)
        mine = torch.cat([x[..., a:b] for a, b in self.owned], dim=-1) if self.owned else x[..., :0]
        squares = mine.pow(2).sum(-1, keepdim=True)
        # every rank uses the sum on its own share, so its gradient is the ranks' sum
        mean = regions.copy_to_tp(regions.reduce_from_tp(squares, group), group) / self.width
        scaled: torch.Tensor = self.module.weight * (x * torch.rsqrt(mean + self.module.variance_epsilon))
        return scaled.to(hidden_states.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> TPRMSNorm:
        return TPRMSNorm(memo[id(self.module)], self.width, self.owned)
