"""Functions of torch that need some numbers per token from the other ranks, and the losses made of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.tensor.device_asserts import asserts_by_itself
from tp_plugin.tensor.vocab import kernels
from tp_plugin.tensor.vocab.elementwise import cast, elementwise
from tp_plugin.tensor.vocab.gather import together
from tp_plugin.tensor.vocab.logits import Logits
from tp_plugin.tensor.vocab.registry import Handler, handles
from tp_plugin.tensor.vocab.statistics import entries, largest, row_sums, statistics, wide


def _is_vocabulary(logits: Any, dim: Any) -> bool:
    """Whether ``dim`` of deferred ``logits`` is the vocabulary."""
    return isinstance(logits, Logits) and isinstance(dim, int) and dim in (logits.axis, logits.axis - logits.dim())


def _ready(name: str, logits: Any, dim: Any) -> bool:
    """Whether the function reduces the vocabulary and all ranks are at it."""
    return _is_vocabulary(logits, dim) and together(name, logits.vocabulary, logits.expr)


def _per_row(found: torch.Tensor, logits: Logits, keepdim: bool = False) -> torch.Tensor:
    found = found.reshape(logits.lead)
    return found.unsqueeze(logits.axis) if keepdim else found


def _dtype_of(func: Handler, logits: Logits) -> torch.dtype:
    """What torch's ``func`` of a dimension makes of logits of this dtype; autocast may choose another one."""
    return _dtype_under(kernels.autocast_dtype(logits.device.type), func, logits.dtype, logits.device)


def _plain_cross_entropy(table: torch.Tensor, dim: int) -> torch.Tensor:
    return F.cross_entropy(table, torch.zeros(1, dtype=torch.int64, device=table.device))


@functools.cache  # finding it out takes some launches on a device
def _dtype_under(autocast: object, func: Handler, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    found: torch.dtype = func(torch.zeros(1, 2, dtype=dtype, device=device), -1).dtype
    return found


@handles("log_softmax")
def _log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not _ready("log_softmax", input, dim):
        return NotImplemented
    return cast(log_probabilities(input), dtype or _dtype_of(torch.log_softmax, input))


@handles("softmax")
def _softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not _ready("softmax", input, dim):
        return NotImplemented
    return cast(log_probabilities(input).exp(), dtype or _dtype_of(torch.softmax, input))


@handles("logsumexp")
def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    if not _ready("logsumexp", input, dim):
        return NotImplemented
    return _per_row(statistics(input)[0], input, keepdim).to(input.dtype)


def log_probabilities(logits: Logits) -> Any:
    """Logarithms of probabilities, deferred, in the dtype that sums are in. All ranks must call it.

    One all-gather of two numbers per token, one all-reduce of one in the backward.
    """
    logits = cast(logits, wide(logits.dtype))  # first, so that the gradient's two terms are added before it is rounded
    return logits - _per_row(statistics(logits)[0], logits, keepdim=True)


@handles("sum")
def _sum(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    if not isinstance(input, Logits) or not input.is_floating_point():
        return NotImplemented
    if not (dim is None or _is_vocabulary(input, dim)) or not together("sum", input.vocabulary, input.expr):
        return NotImplemented
    found = row_sums(input)
    found = found.sum() if dim is None else _per_row(found, input, keepdim)
    return found.to(dtype or input.dtype)


@handles("mean")
def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dtype = dtype or input.dtype
    found = _sum(input, dim, keepdim, dtype=wide(dtype))
    if found is NotImplemented:
        return found
    return (found / (input.numel() if dim is None else input.vocabulary.size)).to(dtype)


@handles("gather")
def _gather(input: Any, dim: Any, index: Any, *, sparse_grad: bool = False) -> Any:
    if not _is_vocabulary(input, dim) or isinstance(index, Logits) or index.dim() != input.dim() or sparse_grad:
        return NotImplemented
    moved = index.movedim(input.axis, -1)
    if moved.shape[:-1] != input.lead or not together("gather", input.vocabulary, input.expr, index):
        return NotImplemented
    at = moved.reshape(input.rows, -1)
    _check_range(at, input.vocabulary.size, "index {} is out of bounds for dimension -1 with size {}")
    return entries(input, at).reshape(moved.shape).movedim(-1, input.axis)


@handles("take_along_dim")
def _take_along_dim(input: Any, indices: Any, dim: Any = None) -> Any:
    return _gather(input, dim, indices) if _is_vocabulary(input, dim) else NotImplemented


@handles("argmax")
def _argmax(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not _ready("argmax", input, dim):
        return NotImplemented
    with torch.no_grad():
        return _per_row(largest(input, 1)[1], input, keepdim)


@handles("max")
def _max(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not _ready("max", input, dim):
        return NotImplemented
    found, places = _top(input, 1)
    return torch.return_types.max((_per_row(found, input, keepdim), _per_row(places, input, keepdim)))


@handles("topk")
def _topk(input: Any, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _is_vocabulary(input, dim) or not largest or not 1 <= k <= input.vocabulary.size:
        return NotImplemented
    if not together(f"topk {k}", input.vocabulary, input.expr):
        return NotImplemented
    values, at = (part.reshape(*input.lead, k).movedim(-1, input.axis) for part in _top(input, k))
    return torch.return_types.topk((values, at))


def _top(logits: Logits, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`largest`, of which the entries have a gradient."""
    with torch.no_grad():
        places = largest(logits, k)[1]
    return entries(logits, places), places


@handles("cross_entropy")
def _cross_entropy(
    input: Any,
    target: Any,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not _has_labels(input, target, weight, size_average, reduce):
        return NotImplemented
    # inside a forward all ranks are at the model's own loss
    if not input.vocabulary.peers.in_forward and not together("cross_entropy", input.vocabulary, input.expr, target):
        return NotImplemented
    labels, ignored = _labels(input, target, ignore_index)
    log_sum, entry, *total = statistics(input, labels, label_smoothing > 0)
    loss = torch.sub(log_sum, entry, alpha=1 - label_smoothing)
    if label_smoothing:
        loss = torch.sub(loss, total[0], alpha=label_smoothing / input.vocabulary.size)
    dtype = _dtype_of(_plain_cross_entropy, input)
    return _reduce(loss, ignored, reduction, target.shape).to(dtype)


@handles("nll_loss")
def _nll_loss(
    input: Any,
    target: Any,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if not _has_labels(input, target, weight, size_average, reduce):
        return NotImplemented
    if not together("nll_loss", input.vocabulary, input.expr, target):
        return NotImplemented
    labels, ignored = _labels(input, target, ignore_index)
    found = entries(input, labels.unsqueeze(-1)).squeeze(-1)
    return _reduce(-found, ignored, reduction, target.shape)


def _has_labels(input: Any, target: torch.Tensor, *unsupported: Any) -> bool:
    """Whether targets are labels (not probabilities) for classes in dimension 1 (of one sample: 0)."""
    if not isinstance(input, Logits) or any(each is not None for each in unsupported):
        return False
    return input.axis == (input.dim() > 1) and target.shape == input.lead


def _labels(logits: Logits, target: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One label per row, 0 where it is to be ignored, and where that is."""
    labels = target.reshape(-1)
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)
    _check_range(labels, logits.vocabulary.size, "Target {} is out of bounds.")
    return labels, ignored


def _reduce(loss: torch.Tensor, ignored: torch.Tensor, reduction: str, shape: torch.Size) -> torch.Tensor:
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss.reshape(shape)
    return loss.sum() / (~ignored).sum() if reduction == "mean" else loss.sum()


def _check_range(at: torch.Tensor, size: int, message: str) -> None:
    inside = at == at.clamp(0, size - 1)
    if asserts_by_itself(at):
        torch._assert_async(inside.all(), message.format("?", size))
    elif not inside.all():
        raise IndexError(message.format(at[~inside][0].item(), size))


@handles("kl_div")
def _kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if not isinstance(input, Logits) or size_average is not None or reduce is not None:
        return NotImplemented
    each = elementwise(F.kl_div, (input, target), {"reduction": "none", "log_target": log_target})
    if each is NotImplemented or reduction == "none":
        return each
    if reduction == "batchmean":
        return each.sum() / input.shape[0]
    return each.mean() if reduction == "mean" else each.sum()
