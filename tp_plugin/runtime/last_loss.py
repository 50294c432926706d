"""The loss at which the last backward began: the ranks of a unit compare it at the next forward."""

from __future__ import annotations

import math

import torch


class LastLoss:
    """Holds one number until it is compared."""

    def __init__(self) -> None:
        self._loss: torch.Tensor | None = None

    def backward_from(self, tensor: torch.Tensor) -> None:
        """A backward begins at ``tensor``; only a single number is a loss."""
        self._loss = tensor.detach() if tensor.numel() == 1 else None

    def take(self) -> float:
        """The loss of the last backward, once; NaN if there is none to compare."""
        taken, self._loss = self._loss, None
        return math.nan if taken is None else float(taken)
