"""The auxiliary loss of a mixture's routers, as of the whole batch.

It is a product of two sums over the tokens of all layers: how many chose an expert, which has no gradient, and the
probabilities of the expert. Each stage has both of its own layers and of each micro-batch; once all forwards are
through, they are added up, and the gradient of every probability is known.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAME = "load_balancing_loss_func"
"""By which transformers' mixtures call it."""

USE = "loss += self.router_aux_loss_coef * aux_loss"


@dataclass
class Sums:
    """Of some layers and a micro-batch.

    Attributes:
        chosen: by expert, how many tokens chose it; then the number of tokens.
        probabilities: by expert; in the graph.
    """

    chosen: torch.Tensor
    probabilities: torch.Tensor


class RouterLoss:
    """Sums up in place of the function that the model's forward calls.

    Args:
        names: the globals of that forward.
    """

    def __init__(self, model: nn.Module, names: dict[str, Any]):
        self._model, self._names = model, names

    @property
    def coefficient(self) -> float:
        """Of the auxiliary loss in the loss."""
        return float(self._model.router_aux_loss_coef)  # type: ignore[arg-type]

    @staticmethod
    def of(model: nn.Module) -> RouterLoss | None:
        """None: the model has no such loss, or makes it in a way of its own."""
        forward = inspect.unwrap(type(model).forward)
        with contextlib.suppress(OSError, TypeError):
            own = forward.__globals__.get(NAME)
            if own is not None and USE in inspect.getsource(forward) and _is_known(own):
                return RouterLoss(model, forward.__globals__)
        return None

    @contextlib.contextmanager
    def summing(self) -> Iterator[list[Sums]]:
        """Inside, the model's forwards add no auxiliary loss, and each leaves its sums."""
        found: list[Sums] = []

        def leave(logits: Any, experts: int, top_k: int = 2, mask: torch.Tensor | None = None) -> torch.Tensor:
            found.append(sums(logits or (), experts, top_k, mask))
            return torch.zeros((), device=found[-1].chosen.device)

        own, self._names[NAME] = self._names[NAME], leave
        try:
            yield found
        finally:
            self._names[NAME] = own


def sums(
    logits: tuple[torch.Tensor, ...], experts: int, top_k: int, mask: torch.Tensor | None, device: Any = None
) -> Sums:
    """Of layers with these router logits (tokens, experts); ``mask`` (rows, tokens) leaves out what is padding."""
    device = logits[0].device if logits else device if mask is None else mask.device
    chosen = torch.zeros(experts + 1, device=device)
    probabilities = torch.zeros(experts, device=device)
    for one in logits:
        weights = one.softmax(-1)
        counts = torch.ones(len(one), device=device) if mask is None else mask.reshape(-1).to(device, torch.float32)
        best = weights.detach().topk(top_k, -1).indices.reshape(-1)
        chosen = chosen.scatter_add(0, best, counts.repeat_interleave(top_k))
        chosen[-1] += counts.sum()
        probabilities = probabilities + (weights.float() * counts[:, None]).sum(0)
    return Sums(chosen, probabilities)


def loss_of(chosen: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The auxiliary loss of all sums together, and its gradient by the probabilities."""
    chosen, tokens = chosen[:-1], chosen[-1]
    slope = len(chosen) * chosen / tokens**2
    return (slope * probabilities).sum(), slope


def _is_known(own: Callable[..., Any]) -> bool:
    """Whether it gives what the sums give; tried, as every model has a copy of its own."""
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(6, 4, generator=generator, device="cpu") for _ in range(2))
    for mask in (None, torch.tensor([[1, 1, 0], [0, 1, 1]], device="cpu")):
        found = sums(logits, 4, 2, mask)
        if abs(float(own(logits, 4, 2, mask)) / float(loss_of(found.chosen, found.probabilities)[0]) - 1) > 1e-5:
            return False
    return True
