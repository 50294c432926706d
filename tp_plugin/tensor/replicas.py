"""Gradients of replicated elements, summed over the ranks that share them."""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.mesh.groups import Group

Piece = tuple[Group, int | None, tuple[tuple[int, int], ...]]
"""A group, and the local ranges of a dimension that its ranks share (None: the whole tensor)."""


class ReplicaSum:
    """Tensor hook on a parameter: sum the gradient of replicated elements over the ranks that share them.

    It runs once per backward, on that backward's gradient and before it is accumulated, so accumulation over
    micro-batches stays right, and DDP and ZeRO see the sum.
    """

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces

    def hook(self, parameter: Any) -> None:
        """Register on ``parameter``, a leaf of autograd's graph."""
        # a leaf takes a hook only while it requires grad; it keeps the hook when it is frozen and thawed
        trained = parameter.requires_grad
        parameter.requires_grad_(True)
        parameter.register_hook(self)
        parameter.requires_grad_(trained)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        for group, dim, ranges in self.pieces:
            if dim is None:
                group.all_reduce(grad)
                continue
            views = [grad.narrow(dim, a, b - a) for a, b in ranges]
            summed = group.all_reduce(torch.cat(views, dim))
            for view, part in zip(views, torch.split(summed, [b - a for a, b in ranges], dim), strict=True):
                view.copy_(part)
        return grad
