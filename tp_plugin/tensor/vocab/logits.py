"""The tensor that a split head returns: whole to the script, this rank's columns in memory.

Its shape is (…, vocabulary). It is a node of autograd's graph like any tensor, and so is its gradient: what flows back
into it is again such a tensor, computed block by block where it is used. A function that :mod:`.registry` does not
list, or not with these arguments, is called on the gathered logits: an ordinary tensor with the same gradient.

Writing into logits gathers them, too. That a function has written is seen by torch's version counter; from then on the
logits and all views of them are the gathered tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tp_plugin.errors import TPError
from tp_plugin.tensor.first_order import first_order
from tp_plugin.tensor.graphs import end_graph, skip
from tp_plugin.tensor.peer_reads import Held
from tp_plugin.tensor.vocab.expr import Expr, Full, Slot, visit
from tp_plugin.tensor.vocab.gather import gather
from tp_plugin.tensor.vocab.registry import HANDLERS, OF_THE_WRAPPER, handles, note_gather
from tp_plugin.tensor.vocab.vocabulary import Vocabulary

Result = TypeVar("Result", bound=torch.Tensor)
Gradient = Callable[[Any, Any, int], Any]


class Logits(torch.Tensor):
    """Values (…, vocabulary) of which this rank computes its own columns.

    Attributes:
        vocabulary: which columns are whose.
        expr: the values, one row for each token of this tensor.
        strides: a tensor on the meta device with this tensor's sizes and strides over the memory of its ``root``.
        axis: the dimension of the vocabulary; the last but in transposed views.
        held: the heads' outputs in ``expr``, which other ranks may read.
        root: the tensor whose memory this one is a view of; itself if it is none.
    """

    vocabulary: Vocabulary
    expr: Expr
    strides: torch.Tensor
    axis: int
    held: tuple[Held, ...]
    _root: Logits | None
    _plain: tuple[torch.Tensor, int] | None  # what plain() gave, with its version
    _gathered: dict[Any, tuple[torch.Tensor, int]]  # of a root: gathered views by their strides, with their versions
    _written: torch.Tensor | None  # of a root: all columns, once something was written into them

    @staticmethod
    def make(
        vocabulary: Vocabulary,
        expr: Expr,
        shape: torch.Size | torch.Tensor,
        device: torch.device,
        held: tuple[Held, ...] = (),
        root: Logits | None = None,
    ) -> Logits:
        """A new tensor, outside of autograd's graph; ``shape``: sizes, or ``strides`` of the result."""
        if not isinstance(shape, torch.Tensor):
            shape = torch.empty(shape, device="meta")
        made: Any = torch.Tensor._make_wrapper_subclass(
            Logits, shape.shape, strides=shape.stride(), dtype=expr.dtype, device=device
        )
        made.vocabulary, made.expr, made.strides, made.held = vocabulary, expr, shape, held
        made.axis = axis_of(shape, vocabulary.size)
        assert made.axis is not None
        made._root, made._plain, made._gathered, made._written = root, None, {}, None
        result: Logits = made
        return result

    @property
    def root(self) -> Logits:
        """See the class."""
        return self if self._root is None else self._root

    @property
    def lead(self) -> torch.Size:
        """The sizes of the other dimensions."""
        return torch.Size(length for dim, length in enumerate(self.shape) if dim != self.axis)

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.numel() // self.vocabulary.size

    def plain(self) -> torch.Tensor:
        """All columns as an ordinary tensor in autograd's graph, the same at each call; the first communicates."""
        root, axis = self.root, self.axis
        if root._written is None:
            if self._plain is None:
                with torch.enable_grad():  # all ranks compute one loss of them: each takes its columns of the gradient
                    values = in_graph(self.gathered(), [self], (), lambda _, grad, at: incoming(grad, axis))
                self._plain = values, values._version
            return self._plain[0]
        with torch._C.DisableTorchFunctionSubclass():
            is_detached = root.requires_grad and not self.requires_grad
        found = root._written if self is root else _view(root._written, self.strides)
        return found.detach() if is_detached else found

    def gathered(self) -> torch.Tensor:
        """All columns outside of the graph; all results share memory."""
        root = self.root
        if root._written is not None:
            return _view(root._written.detach(), self.strides)
        key, whole = (
            (each.strides.shape, each.strides.stride(), each.strides.storage_offset()) for each in (self, root)
        )
        if whole in root._gathered:
            return _view(root._gathered[whole][0], self.strides).detach()
        if key not in root._gathered:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version
                rows = gather(self.expr, self.vocabulary, self.device)
                values = rows.view(*self.lead, self.vocabulary.size).movedim(-1, self.axis)
            root._gathered[key] = values, values._version
        return root._gathered[key][0].detach()

    def note_writes(self) -> None:
        """See whether something was written into what :meth:`plain` gave, or into a view of it (``x[..., 3] += 1``).

        If so, these logits and all views of them are ordinary tensors from now on.

        Raises:
            TPError: it was written into through another view of the same memory.
        """
        root = self.root
        if root._written is not None:
            return
        if self._plain is None or self._plain[0]._version == self._plain[1]:
            if any(values._version != version for values, version in root._gathered.values()):
                raise TPError(
                    "a tensor that shares memory with these logits was written into, which their losses would not see; "
                    "clone() it before, or write into the logits themselves (logits[..., :4] = value)"
                )
            return
        values = self._plain[0]
        if self.strides is root.strides and values.requires_grad >= root.requires_grad:
            root._written = values
            return
        with torch.enable_grad():
            root._written = root.plain()
        view = _view(root._written, self.strides)
        if values.requires_grad or values.data_ptr() != view.data_ptr():
            view.copy_(values)

    @classmethod
    @skip
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        end_graph()  # dynamo would trace what is below without its nodes of autograd, and lose the gradient
        kwargs = dict(kwargs or {})
        given = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Logits)]
        for logits in given if func not in OF_THE_WRAPPER else ():
            logits.note_writes()
        written = any(logits.root._written is not None for logits in given)
        if func is torch.Tensor.__hash__ or (func in OF_THE_WRAPPER and not written):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not written:
            result = HANDLERS[func](*args, **kwargs) if func in HANDLERS else NotImplemented
            if result is not NotImplemented:
                return result
            note_gather(func)
        values = [logits.plain() for logits in given]
        args, kwargs = tree_map_only(Logits, Logits.plain, (args, kwargs))
        result = func(*args, **kwargs)
        for logits, plain in zip(given, values, strict=True):
            logits.note_writes()
            result = logits.plain() if result is plain else result
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # below autograd: what torch itself does with a tensor or its gradient
        kwargs = dict(kwargs or {})
        given = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Logits)]
        with torch.no_grad():
            if func in HANDLERS and all(logits.root._written is None for logits in given):
                result = HANDLERS[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
            args, kwargs = tree_map_only(Logits, Logits.gathered, (args, kwargs))
            return func(*args, **kwargs)


@handles("detach")
def _alias(logits: Logits) -> Logits:
    return Logits.make(logits.vocabulary, logits.expr, logits.strides, logits.device, logits.held, logits.root)


HANDLERS[torch.Tensor.data.__get__] = _alias  # type: ignore[attr-defined]
HANDLERS[torch.ops.aten.detach.default] = HANDLERS[torch.ops.aten.alias.default] = _alias


def _view(memory: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(strides.shape, strides.stride(), strides.storage_offset())


def axis_of(strides: torch.Tensor, size: int) -> int | None:
    """The dimension that is the vocabulary in a view of rows of ``size``; None if the view does not keep it whole."""
    for axis in reversed(range(strides.dim())):
        others = [(strides.shape[dim], strides.stride(dim)) for dim in range(strides.dim()) if dim != axis]
        whole = strides.shape[axis] == size and strides.stride(axis) == 1 and strides.storage_offset() % size == 0
        if whole and all(stride % size == 0 for length, stride in others if length > 1):
            return axis
    return None


def tracks(logits: Logits) -> bool:
    """Whether what is computed of ``logits`` now has a gradient."""
    return logits.requires_grad and torch.is_grad_enabled()


def new_strides(like: Logits) -> torch.Tensor:
    """``strides`` of a new tensor of the same sizes, its rows in the order of ``like``."""
    return torch.empty((*like.lead, like.vocabulary.size), device="meta").movedim(-1, like.axis)


def incoming(grad: torch.Tensor, axis: int) -> Expr:
    """A gradient that autograd hands back, deferred or ordinary, as an expression."""
    return grad.expr if isinstance(grad, Logits) else Full(grad.movedim(axis, -1).reshape(-1, grad.shape[axis]))


def in_graph(result: Result, parents: Sequence[torch.Tensor], saved: Any, gradient: Gradient) -> Result:
    """``result``, Logits or an ordinary tensor, as what was computed of ``parents``, of which some are Logits.

    Args:
        saved: expressions and tensors that ``gradient`` takes; tensors are kept as autograd keeps them, so that they
            go when the graph is used up.
        gradient: from ``saved``, the gradient of ``result`` and the position of a parent to the gradient of that;
            both gradients are expressions where the tensor is a Logits, and tensors else.
    """
    if not torch.is_grad_enabled() or not any(parent.requires_grad for parent in parents):
        return result
    return _Node.apply((result,), saved, gradient, *parents)  # type: ignore[no-any-return]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box: tuple[Any], saved: Any, gradient: Gradient, *parents: torch.Tensor) -> Any:
        tensors: list[torch.Tensor] = []

        def put(node: Any) -> Any:
            if not isinstance(node, torch.Tensor):
                return node
            tensors.append(node)
            return Slot(len(tensors) - 1, node.dtype)

        ctx.saved, ctx.gradient = visit(saved, put), gradient
        ctx.save_for_backward(*tensors)
        ctx.axis = box[0].axis if isinstance(box[0], Logits) else None
        ctx.parents = [
            (parent.vocabulary, new_strides(parent), parent.device) if isinstance(parent, Logits) else None
            for parent in parents
        ]
        return box[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved = visit(ctx.saved, lambda node: tensors[node.at] if isinstance(node, Slot) else node)
        given = grad if ctx.axis is None else incoming(grad, ctx.axis)
        grads: list[torch.Tensor | None] = [None, None, None]
        for position, parent in enumerate(ctx.parents):
            found = ctx.gradient(saved, given, position) if ctx.needs_input_grad[3 + position] else None
            if isinstance(found, Expr):
                vocabulary, strides, device = parent
                found = Logits.make(vocabulary, found, strides, device)
            grads.append(found)
        return tuple(grads)
