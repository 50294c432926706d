"""Views and copies of deferred logits that keep the vocabulary whole: the same rows, fewer, or in another order.

The sizes, the strides and whether the result is a view are what torch itself says for a tensor on the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tp_plugin.tensor.vocab.expr import ALL, Expr, TakeRows
from tp_plugin.tensor.vocab.logits import Logits, axis_of, in_graph, tracks
from tp_plugin.tensor.vocab.registry import HANDLERS, Handler, functions, handles


def _view(func: Handler) -> Handler:
    def handler(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, Logits) or any(isinstance(arg, Logits) for arg in tree_leaves((args, kwargs))):
            return NotImplemented
        after = func(logits.strides, *args, **kwargs)
        many = isinstance(after, tuple | list)
        shapes = after if many else (after,)
        if any(axis_of(shape, logits.vocabulary.size) is None for shape in shapes):
            return NotImplemented
        made = [_reshaped(logits, shape) for shape in shapes]
        return type(after)(made) if many else made[0]

    return handler


def _reshaped(logits: Logits, strides: torch.Tensor) -> Logits:
    if strides.untyped_storage()._cdata != logits.strides.untyped_storage()._cdata:  # a copy has all rows, in order
        made = Logits.make(logits.vocabulary, logits.expr, strides.shape, logits.device, logits.held)
        return in_graph(made, [logits], None, _row_gradient)
    root = logits.root
    index = _order(strides, root, root.device)
    expr = root.expr if index is None else TakeRows(root.expr, index)
    made = Logits.make(logits.vocabulary, expr, strides, logits.device, logits.held, root)
    places = _places(logits, made) if tracks(logits) else None
    return in_graph(made, [logits], places, _row_gradient)


def _order(strides: torch.Tensor, root: Logits, device: torch.device | str) -> torch.Tensor | None:
    """The rows of ``root`` that a view of it has, in the view's order; None for all of them as they stand."""
    size = root.vocabulary.size
    axis = axis_of(strides, size)
    assert axis is not None
    lead = strides.movedim(axis, -1)
    if lead.is_contiguous() and lead.numel() == root.numel():
        return None
    steps = [stride // size for stride in lead.stride()[:-1]]
    rows = torch.arange(root.rows, device=device)
    return rows.as_strided(lead.shape[:-1], steps, strides.storage_offset() // size).reshape(-1)


def _places(parent: Logits, view: Logits) -> torch.Tensor | None:
    """For each row of ``parent`` which row of its view it is, -1 for none; None if they have the same rows in order."""
    root = parent.root
    theirs, ours = (_order(each.strides, root, "cpu") for each in (parent, view))  # no synchronisation with a device
    if (theirs is None and ours is None) or (theirs is not None and ours is not None and torch.equal(theirs, ours)):
        return None
    theirs, ours = (_order(each.strides, root, root.device) for each in (parent, view))
    places = torch.full((root.rows,), -1, device=root.device)
    places[ALL if ours is None else ours] = torch.arange(view.rows, device=root.device)
    return places if theirs is None else places[theirs]


def _row_gradient(places: torch.Tensor | None, grad: Expr, position: int) -> Expr:
    return grad if places is None else TakeRows(grad, places, has_gaps=True)


for _func in functions(
    "view reshape flatten unflatten squeeze unsqueeze select narrow transpose swapaxes swapdims movedim moveaxis "
    "permute unbind split split_with_sizes chunk tensor_split contiguous clone"
):
    HANDLERS[_func] = _view(_func)
HANDLERS[torch.ops.aten.view.default] = HANDLERS[torch.ops.aten._unsafe_view.default] = _view(torch.Tensor.view)
HANDLERS[torch.ops.aten.clone.default] = _view(torch.clone)


@handles("__getitem__")
def _getitem(logits: Any, index: Any) -> Any:
    if not isinstance(logits, Logits):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return _view(torch.Tensor.__getitem__)(logits, index)
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and type(index) is torch.Tensor
    if not is_mask or index.shape != logits.lead or logits.axis != logits.dim() - 1:
        return NotImplemented
    chosen = index.reshape(-1).nonzero().squeeze(-1)
    shape = torch.Size((len(chosen), logits.vocabulary.size))
    made = Logits.make(logits.vocabulary, TakeRows(logits.expr, chosen), shape, logits.device, logits.held)
    places = chosen.new_full((logits.rows,), -1)
    places[chosen] = torch.arange(len(chosen), device=chosen.device)
    return in_graph(made, [logits], places, _row_gradient)


@handles("view_as")
def _view_as(logits: Any, other: torch.Tensor) -> Any:
    return logits.view(other.shape)


@handles("__iter__")
def _iterate(logits: Logits) -> Any:
    return iter(logits.unbind(0))
