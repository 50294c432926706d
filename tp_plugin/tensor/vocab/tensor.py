"""The tensor that a sharded head returns: whole to the script, this rank's columns in memory.

Its shape is (…, vocabulary). It is a node of autograd's graph like any tensor, and so is its gradient: what flows back
into it is again such a tensor, computed block by block where it is used. What stays deferred, what communicates a few
numbers per token and what gathers is decided in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tp_plugin.runtime.current import require
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.vocab.expr import Apply, Cast, Columns, Expr, Leaf, Reordered, Whole
from tp_plugin.tensor.vocab.held import Held


@dataclass(frozen=True)
class Vocabulary:
    """``size`` entries, of which each rank has ``width`` columns; the last ranks' may be padding."""

    size: int
    width: int

    def owned(self, rank: int) -> Columns:
        """The entries of a rank, without padding."""
        return min(rank * self.width, self.size), min((rank + 1) * self.width, self.size)

    @property
    def mine(self) -> Columns:
        """The entries of this rank."""
        return self.owned(require().mesh.tp.rank)


class Logits(torch.Tensor):
    """Values (…, vocabulary) of which this rank computes its own columns.

    Attributes:
        vocabulary: which columns are whose.
        axis: the dimension of the vocabulary; the last but in transposed views.
        expr: the rows of the storage that this tensor and its views share.
        tensors: what the leaves of ``expr`` are here.
        held: the heads' outputs among them, which other ranks may read.
        shape_in_storage: a tensor on the meta device with this tensor's sizes and strides over the storage.
        origin: the tensor of which this is a view, or None.
    """

    vocabulary: Vocabulary
    axis: int
    expr: Expr
    tensors: Mapping[Leaf, torch.Tensor]
    held: tuple[Held, ...]
    shape_in_storage: torch.Tensor
    origin: Logits | None
    _changed: torch.Tensor | None  # the storage, whole, since something was written into it
    _whole: list[torch.Tensor]  # the storage with all columns, once gathered; shared by all that share the storage
    _data: torch.Tensor | None  # the same of this tensor's rows only

    @staticmethod
    def make(
        vocabulary: Vocabulary,
        expr: Expr,
        tensors: Mapping[Leaf, torch.Tensor],
        shape: torch.Size | torch.Tensor,
        device: torch.device,
        held: tuple[Held, ...] = (),
        origin: Logits | None = None,
    ) -> Logits:
        """A new tensor, outside of autograd's graph; ``shape``: sizes, or a view of a storage on the meta device."""
        if not isinstance(shape, torch.Tensor):
            shape = torch.empty(shape, dtype=expr.dtype, device="meta")
        made: Any = torch.Tensor._make_wrapper_subclass(
            Logits, shape.shape, strides=shape.stride(), dtype=expr.dtype, device=device
        )
        used = set(expr.leaves())
        axis = axis_of(shape, vocabulary.size)
        assert axis is not None
        made.vocabulary, made.axis, made.expr, made.origin = vocabulary, axis, expr, origin
        made.tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf in used}
        made.held = tuple(one for one in held if one.leaf in used)
        made.shape_in_storage, made._changed, made._whole, made._data = shape, None, [], None
        result: Logits = made
        return result

    def again(self, shape: torch.Tensor, origin: Logits | None = None) -> Logits:
        """Another tensor of the same storage, outside of the graph."""
        made = Logits.make(self.vocabulary, self.expr, self.tensors, shape, self.device, self.held, origin)
        made._whole = self._whole
        return made

    @property
    def source(self) -> Logits:
        """The tensor whose storage this is."""
        return self if self.origin is None else self.origin

    @property
    def lead(self) -> torch.Size:
        """The sizes of the other dimensions."""
        return torch.Size(length for dim, length in enumerate(self.shape) if dim != self.axis)

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.numel() // self.vocabulary.size

    @property
    def rows_in_storage(self) -> int:
        """Tokens of the storage."""
        shape = self.shape_in_storage
        return int(shape.untyped_storage().nbytes()) // shape.element_size() // self.vocabulary.size

    @property
    def order(self) -> torch.Tensor | None:
        """The storage's rows that this tensor has, in its order; None for all of them as they stand."""
        size, total = self.vocabulary.size, self.rows_in_storage
        shape = self.shape_in_storage.movedim(self.axis, -1)
        if shape.is_contiguous() and shape.numel() == total * size:
            return None
        rows = torch.arange(total, device=self.device)
        strides = [stride // size for stride in shape.stride()[:-1]]
        return rows.as_strided(shape.shape[:-1], strides, shape.storage_offset() // size).reshape(-1)

    def ordered(self) -> tuple[Expr, Mapping[Leaf, torch.Tensor]]:
        """An expression of this tensor's own rows, and its leaves."""
        order = self.order
        if order is None:
            return self.expr, self.tensors
        leaf = Leaf()
        return Reordered(self.expr, leaf, self.expr.dtype), {**self.tensors, leaf: order}

    def storage(self) -> torch.Tensor | None:
        """The storage as an ordinary tensor, if it was written into; then this tensor is a view of that."""
        return self.source._changed

    def plain(self) -> torch.Tensor:
        """All columns as an ordinary tensor in autograd's graph; gathered at the first call."""
        storage = self.storage()
        if storage is not None:
            shape = self.shape_in_storage
            return storage.as_strided(shape.shape, shape.stride(), shape.storage_offset())
        return Gathered.apply(self) if self.requires_grad and torch.is_grad_enabled() else self.gathered()

    def gathered(self) -> torch.Tensor:
        """All columns outside of the graph; memory is shared between calls."""
        from tp_plugin.tensor.vocab import ops

        shape = self.shape_in_storage
        if not self._whole and self._data is None:
            if self.order is None:
                self._whole.append(ops.gather(self).view(-1))
            else:
                self._data = ops.gather(self).view(*self.lead, self.vocabulary.size).movedim(-1, self.axis)
        if self._whole:
            return self._whole[0].as_strided(shape.shape, shape.stride(), shape.storage_offset())
        assert self._data is not None
        return self._data.detach()

    def change(self) -> torch.Tensor:
        """This tensor as an ordinary one, into which the script is about to write."""
        origin = self.source
        if origin._changed is None:
            origin._changed = origin.plain().clone()
        return self.plain()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from tp_plugin.tensor.vocab import ops

        return ops.call(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # below autograd: what torch itself does with a tensor or its gradient
        from tp_plugin.tensor.vocab import ops

        return ops.dispatch(func, args, dict(kwargs or {}))


def axis_of(shape: torch.Tensor, size: int) -> int | None:
    """The dimension that is the vocabulary in a view of rows of ``size``; None if the view does not keep it whole."""
    for axis in reversed(range(shape.dim())):
        others = [(shape.shape[dim], shape.stride(dim)) for dim in range(shape.dim()) if dim != axis]
        whole = shape.shape[axis] == size and shape.stride(axis) == 1 and shape.storage_offset() % size == 0
        if whole and all(stride % size == 0 for length, stride in others if length > 1):
            return axis
    return None


def blank(like: Logits) -> torch.Tensor:
    """Sizes and strides of a new tensor of the same sizes, its rows in the order of ``like``."""
    return torch.empty((*like.lead, like.vocabulary.size), device="meta").movedim(-1, like.axis)


Incoming = tuple[Expr, dict[Leaf, torch.Tensor]]


def incoming(grad: torch.Tensor, axis: int = -1) -> Incoming:
    """A gradient that autograd hands back, deferred or ordinary, as an expression."""
    if isinstance(grad, Logits):
        expr, tensors = grad.ordered()
        return expr, dict(tensors)
    leaf = Leaf()
    return Whole(leaf, grad.dtype), {leaf: grad.movedim(axis, -1).reshape(-1, grad.shape[axis])}


def remember(ctx: Any, like: Logits, tensors: Mapping[Leaf, torch.Tensor], **extra: Any) -> None:
    """Keep what a backward needs; tensors as autograd keeps them, so that they go when the graph is used up."""
    ctx.leaves = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.vocabulary, ctx.axis, ctx.shape, ctx.device = like.vocabulary, like.axis, blank(like), like.device
    for name, value in extra.items():
        setattr(ctx, name, value)


def recalled(ctx: Any) -> dict[Leaf, torch.Tensor]:
    """The tensors of :func:`remember`."""
    return dict(zip(ctx.leaves, ctx.saved_tensors, strict=True))


class Gathered(torch.autograd.Function):
    """The whole values; every rank uses all of them in one and the same loss, so each takes its columns of the
    gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Logits) -> torch.Tensor:
        remember(ctx, logits, {})
        return logits.gathered()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Logits:
        expr, tensors = incoming(grad, ctx.axis)
        return Logits.make(ctx.vocabulary, expr, tensors, ctx.shape, ctx.device)


class Deferred(torch.autograd.Function):
    """A deferred result; ``back`` gives the gradient of each parent from that of the result, as expressions."""

    @staticmethod
    def forward(
        ctx: Any,
        build: Callable[[], tuple[Logits, Mapping[Leaf, torch.Tensor]]],
        back: Callable[[Expr, dict[Leaf, torch.Tensor]], list[Expr | None]],
        *parents: Logits,
    ) -> Logits:
        ctx.set_materialize_grads(False)
        result, tensors = build()
        remember(ctx, result, tensors, back=back, shapes=[blank(parent) for parent in parents])
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * (2 + len(ctx.shapes))
        expr, tensors = incoming(grad, ctx.axis)
        tensors |= recalled(ctx)
        grads = ctx.back(expr, tensors)
        return (
            None,
            None,
            *(
                None if one is None else Logits.make(ctx.vocabulary, one, tensors, shape, ctx.device)
                for one, shape in zip(grads, ctx.shapes, strict=True)
            ),
        )


class Operand(NamedTuple):
    """An ordinary tensor as an argument of :func:`elementwise`; ``dims``: how many it counts as having (0 or all)."""

    expr: Expr
    tensors: Mapping[Leaf, torch.Tensor]
    dims: int


def elementwise(function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Logits:
    """``function`` of deferred tensors of one shape, of operands, and of constants."""
    parents = [arg for arg in args if isinstance(arg, Logits)]
    first = parents[0]
    tensors: dict[Leaf, torch.Tensor] = {}
    inner, metas = [], []
    for arg in args:
        meta: Any = arg
        if isinstance(arg, Logits):
            arg = Operand(*arg.ordered(), arg.dim())
            meta = torch.empty(first.shape, dtype=arg.expr.dtype, device="meta")
        elif isinstance(arg, Operand):
            meta = torch.empty((1,) * arg.dims, dtype=arg.expr.dtype, device="meta")
        if isinstance(arg, Operand):
            tensors |= arg.tensors
        inner.append(arg.expr if isinstance(arg, Operand) else arg)
        metas.append(meta)
    dtype = function(*metas, **kwargs).dtype
    is_cast = function is torch.Tensor.to
    expr: Expr = Cast(inner[0], dtype) if is_cast else Apply(function, tuple(inner), dict(kwargs), dtype)
    held = tuple(one for parent in parents for one in parent.held)
    made = Logits.make(first.vocabulary, expr, tensors, blank(first), first.device, held)
    wanted = [parent.requires_grad for parent in parents]
    if not (torch.is_grad_enabled() and any(wanted) and dtype.is_floating_point):
        return made
    positions = [position for position, arg in enumerate(args) if isinstance(arg, Logits)]

    def back(grad: Expr, _: Mapping[Leaf, torch.Tensor]) -> list[Expr | None]:
        if isinstance(expr, Cast):
            return [Cast(grad, expr.of.dtype)]
        assert isinstance(expr, Apply)
        return [expr.gradient(at, grad) if wants else None for at, wants in zip(positions, wanted, strict=True)]

    result: Logits = Deferred.apply(lambda: (made, tensors), back, *parents)
    return result
