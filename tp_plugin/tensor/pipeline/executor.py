"""One stage's forwards and backwards, on shadows of its parameters: no parameter's hook runs once per micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from tp_plugin.errors import TPError
from tp_plugin.tensor.pipeline.messages import Messages
from tp_plugin.tensor.pipeline.seeds import Seeds


@dataclass
class Passed:
    """A micro-batch whose forward has run here: what came in, what went on, and what the model returned."""

    received: torch.Tensor | None
    sent: torch.Tensor | None
    output: Any
    loss: torch.Tensor | None = None


class Executor:
    """Runs the model's own forward over the holes of one stage.

    Args:
        model: the model; its forward is not called by this class, but ``inner``, which it was.
        messages: this rank's neighbours.
        seeds: random numbers by layer and micro-batch.

    Attributes:
        is_running: whether a pipelined forward or backward runs.
    """

    def __init__(self, model: nn.Module, inner: Callable[..., Any], messages: Messages, seeds: Seeds):
        self._model, self._inner, self.messages, self.seeds = model, inner, messages, seeds
        self.is_running = False
        self._received: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None
        self._like: torch.Tensor | None = None
        self._learns = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a pipelined forward or backward: holes pass on, and elsewhere are errors."""
        outer, self.is_running = self.is_running, True
        try:
            yield
        finally:
            self.is_running = outer

    def receive(self, like: torch.Tensor) -> torch.Tensor:
        """At the hole before this stage's own layers."""
        received = self.messages.receive_hidden(like)
        self._received = received.requires_grad_(True) if self._learns else received
        return self._received

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """At the hole after them."""
        self._sent = hidden
        return hidden

    def forward(self, number: int, call: dict[str, Any], learns: bool) -> Passed:
        """Run micro-batch ``number``, and send what it gives to the next stage."""
        self._received = self._sent = None
        self._learns = learns
        self.seeds.micro_batch = number
        self.seeds.start()
        output = self._inner(**call)
        missed = (self._received is None and not self.messages.is_first) or (
            self._sent is None and not self.messages.is_last
        )
        if missed:  # what this stage has computed did not come from the stage before
            raise TPError(
                "pipeline stages: the model's forward left out a layer at the edge of this stage; write pp_size: 1"
            )
        if not self.messages.is_last:
            assert self._sent is not None
            self.messages.send_hidden(self._sent)
        passed = Passed(self._received, self._sent, output)
        self._received = self._sent = None
        return passed

    def backward(
        self,
        number: int,
        passed: Passed,
        roots: list[torch.Tensor],
        grads: list[Any],
        beside: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """Run the backward of a micro-batch, from ``roots`` on the last stage, and send its gradient on.

        The gradients of parameters add up in the shadows.

        Args:
            beside: roots on every stage, with their gradients.
        """
        self.seeds.micro_batch = number
        if not self.messages.is_last:
            assert passed.sent is not None
            roots, grads = [passed.sent], [self.messages.receive_gradient(passed.sent)]
        pairs = (*zip(roots, grads, strict=True), *beside)
        learned = [(root, grad) for root, grad in pairs if root.requires_grad]
        if learned:
            device = learned[0][0].device.type
            with torch.autocast(device, enabled=False):
                torch.autograd.backward([root for root, _ in learned], [grad for _, grad in learned])
        received = passed.received
        if received is not None:
            gradient = received.grad if received.grad is not None else torch.zeros_like(received)
            self.messages.send_gradient(gradient)
            received.grad = None

    @contextlib.contextmanager
    def shadows(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the model computes with leaves that share its trained parameters' memory; gives them by name."""
        shadows = {
            name: parameter.detach().requires_grad_()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and parameter.numel()
        }
        with self.with_shadows(shadows):
            yield shadows

    @contextlib.contextmanager
    def with_shadows(self, shadows: dict[str, torch.Tensor]) -> Iterator[None]:
        """The same with those that were made before."""
        with _reparametrize_module(self._model, shadows, tie_weights=True):
            yield
