"""Views and copies of deferred logits that keep the vocabulary whole: the same rows, fewer, or in another order.

The sizes, the strides and whether the result is a view are what torch itself says for a tensor on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tp_plugin.tensor.vocab.expr import ALL, Expr, Leaf, Reordered
from tp_plugin.tensor.vocab.ops import HANDLERS, Handler, functions, handles
from tp_plugin.tensor.vocab.tensor import Deferred, Logits, axis_of


def _view(func: Handler) -> Handler:
    def handler(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, Logits) or any(isinstance(arg, Logits) for arg in tree_leaves((args, kwargs))):
            return NotImplemented
        before = logits.shape_in_storage
        after = func(before, *args, **kwargs)
        many = isinstance(after, tuple | list)
        shapes = after if many else (after,)
        if any(axis_of(shape, logits.vocabulary.size) is None for shape in shapes):
            return NotImplemented
        same_storage = before.untyped_storage()._cdata
        made = [_reshaped(logits, shape, shape.untyped_storage()._cdata == same_storage) for shape in shapes]
        return type(after)(made) if many else made[0]

    return handler


def _reshaped(logits: Logits, shape: torch.Tensor, viewed: bool) -> Logits:
    if viewed:
        made = logits.again(shape, origin=logits.source)
        return _in_graph(made, logits, _order_in(logits, made)) if _tracks(logits) else made
    expr, tensors = logits.ordered()  # a copy: all rows in their order
    made = Logits.make(logits.vocabulary, expr, tensors, shape, logits.device, logits.held)
    return _in_graph(made, logits, None) if _tracks(logits) else made


def _tracks(logits: Logits) -> bool:
    return logits.requires_grad and torch.is_grad_enabled()


def _order_in(parent: Logits, child: Logits) -> torch.Tensor | None:
    """Which of the parent's rows each row of a view is; None for all of them in their order."""
    theirs, mine = parent.order, child.order
    if mine is None and theirs is None:
        return None
    rows = torch.arange(parent.rows_in_storage, device=parent.device)
    theirs, mine = rows if theirs is None else theirs, rows if mine is None else mine
    if torch.equal(mine, theirs):
        return None
    place = torch.zeros_like(rows)
    place[theirs] = torch.arange(len(theirs), device=parent.device)
    return place[mine]


def _in_graph(made: Logits, parent: Logits, order: torch.Tensor | None) -> Logits:
    """``made``, whose rows are the parent's rows ``order`` (each at most once), as a node of autograd's graph."""
    leaf = Leaf()
    saved: Mapping[Leaf, torch.Tensor] = {}
    if order is not None:
        place = order.new_full((parent.rows,), -1)
        place[order] = torch.arange(len(order), device=order.device)
        saved = {leaf: place}

    def back(grad: Expr, _: Any) -> list[Expr | None]:
        return [Reordered(grad, leaf, grad.dtype, gaps=True) if some else grad]

    some = order is not None
    result: Logits = Deferred.apply(lambda: (made, saved), back, parent)
    return result


for _func in functions(
    "view reshape flatten unflatten squeeze unsqueeze select narrow transpose swapaxes swapdims movedim moveaxis "
    "permute unbind split split_with_sizes chunk tensor_split contiguous clone"
):
    HANDLERS[_func] = _view(_func)
_below: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.Tensor.view,
    torch.ops.aten._unsafe_view.default: torch.Tensor.view,
    torch.ops.aten.clone.default: torch.clone,
}
for _aten, _func in _below.items():
    HANDLERS[_aten] = _view(_func)


@handles("__getitem__")
def _getitem(logits: Any, index: Any) -> Any:
    if not isinstance(logits, Logits):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, torch.Tensor | list | bool) or hasattr(part, "__array__") for part in parts):
        return _view(torch.Tensor.__getitem__)(logits, index)
    # indices into the leading dimensions are the same indices into a table of rows
    taken = sum(_dimensions(part) for part in parts)
    if logits.axis != logits.dim() - 1:
        return NotImplemented
    if taken == logits.dim() and isinstance(parts[-1], slice) and parts[-1] == ALL:
        parts = parts[:-1]
    elif taken >= logits.dim() or Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
        return NotImplemented
    table = torch.arange(logits.rows, device=logits.device).view(logits.shape[:-1])
    order = table[parts]
    flat = order.reshape(-1)
    if _tracks(logits) and len(flat.unique()) < len(flat):
        return NotImplemented  # a row's gradient would be a sum
    expr, tensors = logits.ordered()
    leaf = Leaf()
    sizes = torch.Size((*order.shape, logits.vocabulary.size))
    chosen = Reordered(expr, leaf, expr.dtype)
    made = Logits.make(logits.vocabulary, chosen, {**tensors, leaf: flat}, sizes, logits.device, logits.held)
    return _in_graph(made, logits, flat) if _tracks(logits) else made


def _dimensions(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    is_mask = isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
    return part.dim() if is_mask else 1


@handles("view_as")
def _view_as(logits: Any, other: torch.Tensor) -> Any:
    return logits.view(other.shape)


@handles("__iter__")
def _iterate(logits: Logits) -> Any:
    return iter(logits.unbind(0))
