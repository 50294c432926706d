"""Scripts that write into logits: the numbers and gradients of one process, in every way in which torch can write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import Passed, causal, labels
from test_vocab_loss import Pair
from workers import run


def one_entry(logits: torch.Tensor) -> torch.Tensor:
    logits[:, :, 3] = -torch.inf
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels(logits).clamp(min=4).flatten())


def image_tokens(logits: torch.Tensor) -> torch.Tensor:
    """As Chameleon's forward does."""
    logits[:, :, [1, 60]] = torch.finfo(logits.dtype).min
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels(logits).clamp(min=4, max=50).flatten())


def biased_entries(logits: torch.Tensor) -> torch.Tensor:
    logits[:, :, 5] += 2
    logits[..., :7] -= 1
    return causal(logits)


def part_of_a_read(logits: torch.Tensor) -> torch.Tensor:
    """Into a slice that was gathered, and not into the logits themselves."""
    first = logits[..., :4]
    first *= 0.5
    return causal(logits) + first.mean()


def through_a_view(logits: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1]
    last[:, 2] = -1e2
    last[last < 0] = 0.5
    return causal(logits) + last.pow(2).mean()


def two_views(logits: torch.Tensor) -> torch.Tensor:
    view = logits[0]
    view.masked_fill_(view < 0, -3)
    logits[:, 5] = 2
    view[1] = 1
    return causal(logits) + view.exp().mean()


def scaled_in_place(logits: torch.Tensor) -> torch.Tensor:
    logits /= 2
    scaled = logits.mul_(0.7)
    return causal(logits) + scaled.mean()


def scaled_view(logits: torch.Tensor) -> torch.Tensor:
    view = logits[:, 2]
    view *= 3
    view[0, 4] = 7
    return causal(logits) + view.mean()


def without_gradient(logits: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits[0, 0] = 0.25
        logits[:, 1].mul_(3)
    return causal(logits)


def detached(logits: torch.Tensor) -> torch.Tensor:
    outside = logits.detach()
    outside[:, :, 2] = 0
    logits.data[0, 1] = 1
    return causal(logits) + (outside * 2).mean()


def not_by_name(logits: torch.Tensor) -> torch.Tensor:
    """A function whose name does not say that it writes."""
    F.relu(logits, inplace=True)
    return causal(logits)


def not_by_name_through_a_view(logits: torch.Tensor) -> torch.Tensor:
    F.relu(logits[:, 1:], inplace=True)
    return causal(logits)


def gradient_afterwards(logits: torch.Tensor) -> torch.Tensor:
    logits *= 2
    logits.retain_grad()
    (found,) = torch.autograd.grad(causal(logits), logits, retain_graph=True)
    causal(logits).backward(retain_graph=True)
    return causal(logits) + (found**2).sum() + (logits.grad**2).sum()


def passed_on_afterwards(logits: torch.Tensor) -> torch.Tensor:
    """Through the autograd functions that ZeRO-3 and DDP put behind a model."""
    logits[:, :, 3] = -5
    for how in ("same", "copied"):
        logits = Passed.apply(logits, how)
    return causal(logits)


WAYS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    one_entry, image_tokens, biased_entries, part_of_a_read, through_a_view, two_views, scaled_in_place, scaled_view,
    without_gradient, detached, not_by_name, not_by_name_through_a_view, gradient_afterwards,
    passed_on_afterwards,
)  # fmt: skip
NEED_GRADIENT = (gradient_afterwards, passed_on_afterwards)


def training_case(tp: int) -> dict[str, float]:
    pair, worst = Pair(tp, 97), {}
    for way in WAYS:
        apart = pair.apart(way)
        apart.pop("bytes")
        worst[way.__name__] = max(apart.values())
    return worst


def test_training() -> None:
    for found in run(2, training_case, 2):
        assert all(apart <= 1e-5 for apart in found.values()), found


def evaluation_case(tp: int, mode: str) -> dict[str, tuple[float, float]]:
    pair, found = Pair(tp, 97), {}
    with getattr(torch, mode)():
        for way in WAYS:
            if way not in NEED_GRADIENT:
                found[way.__name__] = tuple(way(head(pair.input())).item() for head in (pair.split, pair.plain))
    return found


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_evaluation(mode: str) -> None:
    for found in run(2, evaluation_case, 2, mode):
        for name, (split, plain) in found.items():
            assert split == pytest.approx(plain, rel=1e-5), name


def hidden_write_case() -> str:
    """Into what a view gave, of which the logits themselves hear nothing."""
    from tp_plugin.errors import TPError

    pair = Pair(2, 97)
    with torch.no_grad():
        logits = pair.split(pair.input())
        logits[:, -1][..., :4].zero_()
        with pytest.raises(TPError) as raised:
            causal(logits)
    return str(raised.value)


def test_a_write_that_cannot_be_followed_is_refused() -> None:
    for message in run(2, hidden_write_case):
        assert "shares memory with these logits was written into" in message and "clone() it before" in message


def log_case() -> list[str]:
    import logging

    from tp_plugin.tensor.vocab import registry

    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Heard()
    registry.logger.addHandler(handler)
    level = registry.logger.level
    registry.logger.setLevel(logging.INFO)
    registry._log_gather.cache_clear()
    try:
        logits: Any = Pair(2, 97)
        logits = logits.split(logits.input())
        causal(logits), logits.argmax(-1), logits[:, -1], logits / 2
        assert not said
        logits.cumsum(-1), logits.cumsum(-1), logits.mT
    finally:
        registry.logger.removeHandler(handler)
        registry.logger.setLevel(level)
    return said


def test_what_gathers_is_said_once() -> None:
    for said in run(2, log_case):
        assert [message.split("()")[0] for message in said] == ["cumsum", "mT"]
        assert all("gathers all columns on every rank" in message for message in said)
