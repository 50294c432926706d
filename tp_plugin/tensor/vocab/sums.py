"""Operations that need some numbers per token from the other ranks, and the losses that scripts make of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.runtime.current import require
from tp_plugin.tensor.vocab.ops import Handler, handles, is_vocabulary, together
from tp_plugin.tensor.vocab.pointwise import cast
from tp_plugin.tensor.vocab.reductions import LogSoftmax, RowSum, Statistics, Take, largest, wide
from tp_plugin.tensor.vocab.tensor import Logits


def _per_row(found: torch.Tensor, logits: Logits, keepdim: bool = False) -> torch.Tensor:
    found = found.reshape(logits.lead)
    return found.unsqueeze(logits.axis) if keepdim else found


def _dtype_of(func: Handler, logits: Logits) -> torch.dtype:
    """What torch makes of logits of this dtype; autocast may choose another one."""
    table = torch.zeros(1, 2, dtype=logits.dtype, device=logits.device)
    dtype: torch.dtype = func(table).dtype
    return dtype


@handles("log_softmax")
def _log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not is_vocabulary(input, dim) or not together("log_softmax", input):
        return NotImplemented
    return LogSoftmax.apply(input, dtype or _dtype_of(lambda table: table.log_softmax(-1), input))


@handles("softmax")
def _softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not is_vocabulary(input, dim) or not together("softmax", input):
        return NotImplemented
    dtype = dtype or _dtype_of(lambda table: table.softmax(-1), input)
    probabilities: Any = torch.exp(LogSoftmax.apply(input, wide(dtype)))
    return cast(probabilities, dtype)


@handles("logsumexp")
def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    if not is_vocabulary(input, dim) or not together("logsumexp", input):
        return NotImplemented
    labels = torch.zeros(input.rows, dtype=torch.int64, device=input.device)
    return _per_row(Statistics.apply(input, labels, False)[0], input, keepdim).to(input.dtype)


@handles("sum")
def _sum(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    if not (dim is None or is_vocabulary(input, dim)) or not together("sum", input):
        return NotImplemented
    found = RowSum.apply(input)
    found = found.sum() if dim is None else _per_row(found, input, keepdim)
    return found.to(dtype or (input.dtype if input.is_floating_point() else torch.int64))


@handles("mean")
def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dtype = dtype or input.dtype
    found = _sum(input, dim, keepdim, dtype=wide(dtype))
    if found is NotImplemented:
        return found
    return (found / (input.numel() if dim is None else input.vocabulary.size)).to(dtype)


@handles("any")
def _any(input: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not isinstance(input, Logits):
        return NotImplemented
    found = _sum(input != 0)
    return found if found is NotImplemented else found > 0


@handles("all")
def _all(input: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not isinstance(input, Logits):
        return NotImplemented
    found = _sum(input != 0)
    return found if found is NotImplemented else found == input.numel()


@handles("gather")
def _gather(input: Any, dim: Any, index: Any, *, sparse_grad: bool = False) -> Any:
    if not is_vocabulary(input, dim) or isinstance(index, Logits) or index.dim() != input.dim():
        return NotImplemented
    moved = index.movedim(input.axis, -1)
    if moved.shape[:-1] != input.lead:
        return NotImplemented
    if sparse_grad or not together("gather", input, index):
        return NotImplemented
    at = moved.reshape(input.rows, -1)
    _check_range(at, None, input.vocabulary.size, "index {} is out of bounds for dimension -1 with size {}")
    return Take.apply(input, at).reshape(moved.shape).movedim(-1, input.axis)


@handles("take_along_dim")
def _take_along_dim(input: Any, indices: Any, dim: Any = None) -> Any:
    return _gather(input, dim, indices) if is_vocabulary(input, dim) else NotImplemented


@handles("argmax")
def _argmax(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not is_vocabulary(input, dim) or not together("argmax", input):
        return NotImplemented
    with torch.no_grad():
        return _per_row(largest(input, 1)[1], input, keepdim)


@handles("max")
def _max(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not is_vocabulary(input, dim) or not together("max", input):
        return NotImplemented
    with torch.no_grad():
        places = largest(input, 1)[1]
    found = Take.apply(input, places)
    return torch.return_types.max((_per_row(found, input, keepdim), _per_row(places, input, keepdim)))


@handles("topk")
def _topk(input: Any, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True) -> Any:
    if (
        not is_vocabulary(input, dim)
        or not largest
        or not 1 <= k <= input.vocabulary.size
        or not together(f"topk {k}", input)
    ):
        return NotImplemented
    with torch.no_grad():
        places = _largest(input, k)[1]
    found = Take.apply(input, places)
    values, at = (part.reshape(*input.lead, k).movedim(-1, input.axis) for part in (found, places))
    return torch.return_types.topk((values, at))


_largest = largest


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
    if not _fits(input, target) or (weight is not None and label_smoothing):
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    # inside a forward all ranks are at the model's own loss
    if not require().remote_logits.in_forward and not together("cross_entropy", input, target):
        return NotImplemented
    labels = target.reshape(-1)
    ignored = labels == ignore_index
    _check_range(labels, ignored, input.vocabulary.size, "Target {} is out of bounds.")
    log_sum, entry, *total = Statistics.apply(input, labels.masked_fill(ignored, 0), label_smoothing > 0)
    loss = log_sum - entry
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum - total[0] / input.vocabulary.size)
    dtype = _dtype_of(
        lambda table: F.cross_entropy(table, torch.zeros(1, dtype=torch.int64, device=table.device)), input
    )
    return _reduce(loss, target, ignored, weight, reduction).to(dtype)


def _fits(input: Any, target: torch.Tensor) -> bool:
    """Whether targets are labels (not probabilities) for classes in dimension 1 (of one sample: 0)."""
    return isinstance(input, Logits) and input.axis == (input.dim() > 1) and target.shape == input.lead


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
    if not _fits(input, target) or size_average is not None or reduce is not None:
        return NotImplemented
    if not together("nll_loss", input, target):
        return NotImplemented
    labels = target.reshape(-1)
    ignored = labels == ignore_index
    _check_range(labels, ignored, input.vocabulary.size, "Target {} is out of bounds.")
    found = Take.apply(input, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return _reduce(-found, target, ignored, weight, reduction)


def _reduce(
    loss: torch.Tensor, target: torch.Tensor, ignored: torch.Tensor, weight: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    count: torch.Tensor = ~ignored
    if weight is not None:
        count = weight[target.reshape(-1).masked_fill(ignored, 0)].masked_fill(ignored, 0)
        loss = loss * count
    loss = loss.masked_fill(ignored, 0)  # last, so that 0 · nan of an empty mean does not come back
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() / count.sum() if reduction == "mean" else loss.sum()


def _check_range(at: torch.Tensor, ignored: torch.Tensor | None, size: int, message: str) -> None:
    wrong = (at < 0) | (at >= size)
    if ignored is not None:
        wrong &= ~ignored
    if at.is_cuda:
        torch._assert_async(~wrong.any(), message.format("?", size))
    elif wrong.any():
        raise IndexError(message.format(at[wrong][0].item(), size))


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
    each = target.exp() * (target - input) if log_target else torch.xlogy(target, target) - target * input
    if reduction == "none":
        return each
    if reduction == "batchmean":
        return each.sum() / input.shape[0]
    return each.mean() if reduction == "mean" else each.sum()
