"""Biases of stacked experts, whose outputs are summed over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.policy.layout import Range


def part_biases(module: nn.Module, biases: Mapping[str, tuple[Range, int]]) -> None:
    """Make biases of a module whose outputs are summed over the ranks count once.

    Each rank holds a range of the last dimension. What the forward reads under the bias's name has zeros around that
    range, so that the ranks' sum is the whole bias. A property of the class, so that ZeRO-3 has gathered the parameter
    by the time it is read.

    Args:
        biases: name → this rank's range of the last dimension, and that dimension's whole size.
    """

    def reader(name: str, start: int, stop: int, size: int) -> property:
        def read(self: Any) -> torch.Tensor:
            mine: torch.Tensor = self._parameters[name]
            return F.pad(mine, (start, size - stop)) if self.tp_running else mine

        return property(read)

    properties = {name: reader(name, *mine, size) for name, (mine, size) in biases.items()}
    module.__class__ = type(type(module).__name__, (type(module),), {**properties, "tp_running": False})
    module.register_forward_pre_hook(_running)
    module.register_forward_hook(_not_running, always_call=True)


def _running(module: Any, args: Any) -> None:
    module.tp_running = True


def _not_running(module: Any, args: Any, output: Any) -> None:
    module.tp_running = False
