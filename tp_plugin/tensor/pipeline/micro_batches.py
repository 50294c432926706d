"""A call of a model cut into micro-batches, and what the loss of each counts in that of the whole."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError

WHOLE = ("cache_position", "logits_to_keep", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that are not of one row of the batch each, whatever their length."""


@dataclass
class MicroBatches:
    """One call.

    Attributes:
        calls: the arguments of each.
        device: of the batch.
        has_labels: whether the model computes a loss.
        rows: of each.
        shares: factor of each one's loss in the whole's, a number or a scalar tensor.
    """

    calls: list[dict[str, Any]]
    device: torch.device
    has_labels: bool
    rows: list[int]
    shares: list[Any]


def counted(loss: torch.Tensor, share: Any) -> torch.Tensor:
    """What a micro-batch's loss adds to the whole's; without any label its mean is NaN, and adds nothing."""
    part: torch.Tensor = loss * share
    return torch.where(share > 0, part, torch.zeros_like(part)) if isinstance(share, torch.Tensor) else part


def arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound = {**bound, **bound.pop(name, {})}
    return dict(bound)


def batch_of(call: Mapping[str, Any]) -> torch.Tensor:
    """The argument that has the rows of the batch.

    Raises:
        TPError: no argument of the call is known to have some.
    """
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if isinstance(call.get(name), torch.Tensor):
            found: torch.Tensor = call[name]
            return found
    raise TPError(
        f"pipeline stages: this call of the model has none of input_ids, inputs_embeds and pixel_values, only "
        f"{', '.join(call) or 'nothing'}; pass one of them, or write pp_size: 1"
    )


def cut(model: nn.Module, inner: Any, call: dict[str, Any], count: int) -> MicroBatches:
    """``call`` in ``count`` micro-batches, or in fewer: there is a row for each, and their losses add up.

    A mean over labels is the sum of each micro-batch's part of it: by one count for all (``num_items_in_batch``), which
    transformers' losses take, or else weighted by the labels that each has. Any other loss is computed of the whole
    batch, without micro-batches.

    Args:
        inner: the model's own forward.
    """
    batch = batch_of(call)
    rows = len(batch)
    count = min(count, rows)
    labels, counts = call.get("labels"), None
    if labels is not None and count > 1:
        counts = _counted(model, inner, call)
        if counts is None:
            _tell_of_one_micro_batch(type(model).__name__)
            count = 1
        elif _takes_count(inner) and not labels.is_floating_point():
            if call.get("num_items_in_batch") is None:
                call = {**call, "num_items_in_batch": counts.sum()}
            counts = None
    calls = [{name: _part(name, value, rows, count, at) for name, value in call.items()} for at in range(count)]
    sizes = [len(part) for part in torch.arange(rows, device="cpu").tensor_split(count)]
    shares: list[Any] = [1.0] * count
    if counts is not None and count > 1:
        per_part = torch.stack([part.sum() for part in counts.tensor_split(count)])
        shares = list((per_part / per_part.sum()).unbind())
    return MicroBatches(calls, batch.device, labels is not None, sizes, shares)


def _part(name: str, value: Any, rows: int, count: int, at: int) -> Any:
    if isinstance(value, torch.Tensor) and name not in WHOLE:
        # positions may be (tokens,), for all rows, or (axes, rows, tokens), as multimodal rotary embeddings have them
        dim = {1: None, 3: 1}.get(value.dim(), 0) if name == "position_ids" else 0 if value.dim() else None
        return value if dim is None or value.shape[dim] != rows else value.tensor_split(count, dim)[at]
    if isinstance(value, dict):
        return {key: _part(key, inner, rows, count, at) for key, inner in value.items()}
    return value


BY_TOKEN = ("ForMaskedLM", "ForTokenClassification")
BY_ROW = ("ForSequenceClassification", "ForImageClassification")


def _counted(model: nn.Module, inner: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
    """For each row, over how many of its labels the model's loss is a mean; None: it is not known to be one."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    name = type(model).__name__
    if not isinstance(call["labels"], torch.Tensor) or not call["labels"].dim():
        return None
    labels: torch.Tensor = call["labels"]
    uses_own = "self.loss_function(" in _source(inner)
    loss = getattr(model, "loss_function", None) if uses_own else None  # not loss_type, which GPT-2 does not set
    if loss is LOSS_MAPPING["ForCausalLM"]:
        shifted = call.get("shift_labels")
        labels = labels[..., 1:] if shifted is None else shifted
    elif name.endswith(BY_ROW) and (labels.is_floating_point() or labels.dim() == 1):
        if labels.is_floating_point():
            return torch.ones(len(labels), device=labels.device)
    elif not (loss is LOSS_MAPPING["ForMaskedLM"] or (name.endswith(BY_TOKEN) and not labels.is_floating_point())):
        return None
    return (labels != -100).flatten(1).sum(1) if labels.dim() > 1 else (labels != -100).long()


def _takes_count(inner: Any) -> bool:
    """Whether the forward hands ``num_items_in_batch`` to a loss that divides by it."""
    source = _source(inner)
    return (
        "self.loss_function(" in source
        and "**kwargs" in source.rpartition("self.loss_function(")[2].partition("return")[0]
    )


def _source(inner: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(inner))
    except (OSError, TypeError):
        return ""


_told: set[str] = set()


def _tell_of_one_micro_batch(name: str) -> None:
    if name not in _told:
        _told.add(name)
        warnings.warn(
            f"pipeline stages: the loss of {name} is not known to be a mean over labels, of which parts could be added "
            "up, so a batch is one micro-batch, and the stages run one after the other",
            stacklevel=2,
        )
