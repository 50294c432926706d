"""Activations inside of a block as a script's hooks get them: whole, and back to what this rank computes with.

There every rank has its features, or all of them with its part of their gradient. A hook computes the same on all
ranks, from whole values to whole values: what it adds to a gradient counts once, and what comes from behind is summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.sequence import SEQUENCE, Join, Split, Stack, gather_tokens, own_tokens


class Values(Protocol):
    """How an argument or output of one module lies on the ranks; all but :class:`AsItIs` may be collective."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """What one process has there."""

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """What this rank computes with."""

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient that one process has there, of what arrives on this rank."""

    def gradient_part(self, whole: torch.Tensor) -> torch.Tensor:
        """What has to arrive on this rank for that."""


class AsItIs:
    """Every rank has what one process has, and its whole gradient."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """``x``."""
        return x

    part = gradient = gradient_part = whole


@dataclass(frozen=True)
class Features:
    """One dimension lies on the ranks as ``layout``, of shape (features,), says; unsplit: all of it on each rank.

    With its part of the gradient, in both cases: ranks that share elements compute different things of them.
    """

    layout: ParamLayout
    group: Group
    dim: int = -1

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's features → all."""
        return _Gather.apply(x, self)  # type: ignore[no-any-return]

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """All features → this rank's."""
        return _Part.apply(whole, self)  # type: ignore[no-any-return]

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, each in its place."""
        layout = self.of(grad)
        if layout.dim is None:
            return self.group.summed(grad)
        whole = grad.new_zeros(layout.shape)
        layout.place(whole, grad, self.group.rank)
        return self.group.summed(whole)

    def gradient_part(self, whole: torch.Tensor) -> torch.Tensor:
        """Each element on the first rank that has it."""
        layout, rank = self.of(whole), self.group.rank
        if layout.dim is None:
            return whole if rank == 0 else torch.zeros_like(whole)
        mine = layout.shard(whole, rank)
        counted = torch.zeros_like(mine)
        for start, stop in layout.owned(rank):
            counted.narrow(layout.dim, start, stop - start).copy_(mine.narrow(layout.dim, start, stop - start))
        return counted

    def of(self, x: torch.Tensor) -> ParamLayout:
        """The layout of the whole of an activation like ``x``."""
        if self.layout.dim is None:
            return replace(self.layout, shape=tuple(x.shape))
        dim = self.dim % x.dim()
        return replace(self.layout, shape=(*x.shape[:dim], self.layout.shape[0], *x.shape[dim + 1 :]), dim=dim)


@dataclass(frozen=True)
class InnerFeatures:
    """What lies between the two products of an MLP: split like the input of the second, if it is as wide.

    Every method raises :class:`TPError` where that is not so.
    """

    path: str
    block: str
    features: Features | None

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Features`."""
        return self._known(x, here=True).whole(x)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """See :class:`Features`."""
        return self._known(whole, here=False).part(whole)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """See :class:`Features`."""
        return self._known(grad, here=True).gradient(grad)

    def gradient_part(self, whole: torch.Tensor) -> torch.Tensor:
        """See :class:`Features`."""
        return self._known(whole, here=False).gradient_part(whole)

    def _known(self, x: torch.Tensor, here: bool) -> Features:
        known = self.features
        width = known and (known.layout.local_shape(known.group.rank) if here else known.layout.shape)[0]
        if known is None or x.dim() < 2 or x.shape[-1] != width:
            raise TPError(
                f"a hook on {self.path!r}, inside of the block {self.block!r}: each rank of a TP group has its heads "
                f"or features there, and how {tuple(x.shape)} lies on the ranks is not known; put the hook on "
                f"{self.block!r} itself, or on one of its linear layers, where it gets what one process has"
            )
        return known


@dataclass(frozen=True)
class AttentionOutput:
    """The output of an attention block, and the weights of this rank's heads (batch, heads, queries, keys)."""

    output: Values
    heads: Features

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Values`."""
        return self._of(x).whole(x)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """See :class:`Values`."""
        return self._of(whole).part(whole)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """See :class:`Values`."""
        return self._of(grad).gradient(grad)

    def gradient_part(self, whole: torch.Tensor) -> torch.Tensor:
        """See :class:`Values`."""
        return self._of(whole).gradient_part(whole)

    def _of(self, x: torch.Tensor) -> Values:
        return self.heads if x.dim() == 4 else self.output


@dataclass(frozen=True)
class Tokens:
    """Between the blocks of a stack under sequence parallelism: this rank's tokens while the stack runs.

    (batch, this rank's tokens, hidden) and (batch, sequence, hidden); what has other shapes is as it is.

    Args:
        behind: of what is asked for when the last layer has joined the tokens, and its arguments still are parts.
    """

    stack: Stack
    behind: bool = False

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens → all."""
        if not self._is_part(x):
            return x
        return Join.apply(x, self.stack, self.stack.length)  # type: ignore[no-any-return]

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """All tokens → this rank's."""
        return Split.apply(whole, self.stack.group) if self._is_whole(whole) else whole

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """As of the values."""
        if not self._is_part(grad):
            return grad
        return gather_tokens(grad.contiguous(), SEQUENCE, self.stack.length, self.stack.group)

    def gradient_part(self, whole: torch.Tensor) -> torch.Tensor:
        """As of the values."""
        return own_tokens(whole, SEQUENCE, self.stack.group) if self._is_whole(whole) else whole

    def _is_part(self, x: torch.Tensor) -> bool:
        return self._splits and x.dim() == 3 and x.shape[SEQUENCE] == self._own

    def _is_whole(self, x: torch.Tensor) -> bool:
        return self._splits and x.dim() == 3 and x.shape[SEQUENCE] == self.stack.length

    @property
    def _own(self) -> int:
        return -(-self.stack.length // self.stack.group.size)

    @property
    def _splits(self) -> bool:
        return (self.stack.ran if self.behind else self.stack.runs) and self._own < self.stack.length


def _gathered(x: torch.Tensor, features: Features) -> torch.Tensor:
    layout, group = features.of(x), features.group
    dim = layout.dim
    assert dim is not None
    sizes = [layout.local_shape(rank)[dim] for rank in range(group.size)]
    sent = x.new_zeros(*x.shape[:dim], max(sizes), *x.shape[dim + 1 :])  # all-gather takes equal lengths only
    sent.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = group.all_gather(sent)
    return layout.gather([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Forward: this rank's part → the whole. Backward: each element's gradient on the first rank that has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, features: Features) -> torch.Tensor:
        ctx.features = features
        return x.clone() if features.layout.dim is None else _gathered(x, features)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.features.gradient_part(grad), None


class _Part(torch.autograd.Function):
    """Forward: the whole → this rank's part. Backward: the gradients of all parts, summed where they overlap."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, features: Features) -> torch.Tensor:
        ctx.features = features
        layout = features.of(whole)
        return whole.view_as(whole) if layout.dim is None else layout.shard(whole, features.group.rank)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.features.gradient(grad), None
