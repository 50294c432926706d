"""The loss at which the last backward began: the ranks of a unit compare it at the next forward."""

from __future__ import annotations

import math

import torch


class LastLoss:
    """Holds one number until it is compared."""

    def __init__(self) -> None:
        self._loss: torch.Tensor | None = None

    def backward_from(self, tensor: torch.Tensor) -> None:
        """A backward begins at ``tensor``; only a single real number is a loss."""
        self._loss = tensor.detach() if tensor.numel() == 1 and tensor.is_floating_point() else None

    @property
    def rounding(self) -> float:
        """Relative distance of neighbouring numbers in the loss's dtype; of float32 if there is no loss."""
        return torch.finfo(torch.float32 if self._loss is None else self._loss.dtype).eps

    def take(self) -> float:
        """The loss of the last backward, once; NaN if there is none to compare."""
        taken, self._loss = self._loss, None
        return math.nan if taken is None else float(taken)
