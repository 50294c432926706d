"""What a library reads off the vocabulary when it goes from hidden states to numbers per token itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.tensor import regions
from tp_plugin.tensor.vocab.elementwise import elementwise
from tp_plugin.tensor.vocab.head import Fetched, deferred, fused, stays
from tp_plugin.tensor.vocab.kernels import autocast_dtype
from tp_plugin.tensor.vocab.reductions import log_probabilities
from tp_plugin.tensor.vocab.statistics import largest, row_sums, statistics
from tp_plugin.tensor.vocab.vocabulary import Vocabulary


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocabulary: Vocabulary,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    fetched: Fetched = contextlib.nullcontext,
    keep: bool = True,
) -> Any:
    """A head's deferred logits over a split vocabulary, in fp32.

    Args:
        hidden: what the head is given, (tokens, width).
        weight, bias: this rank's rows of the head, (columns, width) and (columns,).
        keep: hold the logits in memory, instead of computing them for each of the numbers and again for its gradient.
        fetched: what gathers the weight for the backward, where it is partitioned in between; now it is there.
    """
    entered = regions.copy_to_tp(hidden, vocabulary.group)
    logits: Any
    if keep or not stays(weight):
        dtype = autocast_dtype(hidden.device.type) or hidden.dtype
        with torch.no_grad():
            own = F.linear(entered.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = deferred(entered, weight, bias, own, vocabulary, fetched).float()
    else:
        logits = fused(entered, weight, bias, vocabulary).float()
    logits = logits if scale == 1 else logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1 else logits / temperature


def scores(logits: Any, targets: torch.Tensor, wanted: Collection[str]) -> dict[str, torch.Tensor]:
    """Numbers of each token's distribution over a split vocabulary, (tokens,) each, in fp32. Collective over the group.

    Args:
        logits: see :func:`head_logits`.
        targets: one vocabulary entry per token, (tokens,).
        wanted: of ``entropy``, ``is_top1``, ``mean_logits`` and ``log_sum_sq_probs``; ``log_probs`` comes always.

    One all-gather of three numbers per token; two reductions more for the entropy, two for ``is_top1``, one for each of
    the others.
    """
    log_sum, entry, *total = statistics(logits, targets, "mean_logits" in wanted)
    found = {"log_probs": entry - log_sum}
    if "entropy" in wanted:
        found["entropy"] = entropy(log_probabilities(logits))
    with torch.no_grad():
        if "mean_logits" in wanted:
            found["mean_logits"] = total[0].detach() / logits.vocabulary.size
        if "is_top1" in wanted:
            found["is_top1"] = largest(logits, 1)[1].squeeze(-1) == targets
        if "log_sum_sq_probs" in wanted:
            found["log_sum_sq_probs"] = statistics(2 * logits)[0] - 2 * log_sum
    return found


def entropy(log_probs: Any) -> torch.Tensor:
    """Of each token's distribution, (tokens,)."""
    return -row_sums(log_probs.exp() * log_probs)


def divergence(student: Any, teacher: Any, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The generalized Jensen-Shannon divergence (Agarwal et al. 2024) of each token, and the student's entropy.

    KL(teacher || student) for ``beta`` 0, KL(student || teacher) for 1, and in between that to their mixture, of which
    the teacher has the weight ``beta``. Logits are those of :func:`head_logits` of the same columns. Collective.
    """
    s, t = log_probabilities(student), log_probabilities(teacher)
    if beta == 0:
        terms = t.exp() * (t - s)
    elif beta == 1:
        terms = s.exp() * (s - t)
    else:
        mixture = elementwise(torch.logaddexp, (s + math.log(1 - beta), t + math.log(beta)), {})
        terms = beta * (t.exp() * (t - mixture)) + (1 - beta) * (s.exp() * (s - mixture))
    with torch.no_grad():
        found = entropy(s.detach())
    return row_sums(terms), found
