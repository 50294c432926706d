"""Stacked experts whose outputs are summed over the ranks: biases that every rank holds in part count once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.policy.layout import Range
from tp_plugin.tensor.forward import Forward, WrappedForward


class ExpertBiasForward(WrappedForward):
    """The forward of a module of experts: what it reads as a bias has zeros around this rank's range.

    So the ranks' sum is the full bias. Made inside the forward, by which time ZeRO-3 has gathered the parameter.

    Args:
        biases: name → this rank's range of the last dimension, and that dimension's full size.
    """

    def __init__(self, module: nn.Module, own: Forward, biases: Mapping[str, tuple[Range, int]]):
        super().__init__(module, own)
        self.biases = dict(biases)

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        padded = {
            name: F.pad(getattr(self.module, name), (start, size - stop))
            for name, ((start, stop), size) in self.biases.items()
        }
        vars(self.module).update(padded)
        try:
            return self.own(*args, **kwargs)
        finally:
            for name in padded:
                del vars(self.module)[name]
