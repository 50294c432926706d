"""How far this process has trained: the clock by which ranks tell whether their weights are of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from tp_plugin.runtime.first_step import FirstStep


class StepWatcher(Protocol):
    """What is told of training forwards and of optimizers' (or DeepSpeed's engine's) steps."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None: ...

    def before_step(self, stepper: Any) -> None: ...

    def after_step(self, stepper: Any) -> None: ...


class Progress:
    """Counts of one process.

    Attributes:
        training_forwards: top-level training forwards of all sharded models.
        backwards: that added to gradients.
        registered: parameters that were put into any module: guards look again when the number has changed.
        looks_for_drift: whether guards sample replicated weights; a proof compares all of them itself.
        optimizer_steps: steps of all optimizers. Fused kernels change weights without counting in-place versions.
        first_step: measures it, until it is done; None in a run that reports nothing.
        call: samples and tokens of a micro-batch of the first step, and how many it had; zeros where it is not known.
        memory_report: compares predicted with measured memory, until it has; None without ``report_memory``.
        weights_ready: on a device, recorded behind the last change of weights; None before any, and on the CPU.
    """

    def __init__(self) -> None:
        self.training_forwards = 0
        self.backwards = 0
        self.registered = 0
        self.looks_for_drift = True
        self.optimizer_steps = 0
        self.first_step: FirstStep | None = None
        self.call = (0, 0, 0)
        self.memory_report: StepWatcher | None = None
        self.weights_ready: torch.Event | None = None

    def stepped(self, device: torch.device) -> None:
        """An optimizer has stepped; its parameters lie on ``device``."""
        self.optimizer_steps += 1
        self.weights_changed(device)
        self.end_first_step()

    def end_first_step(self) -> None:
        """An optimizer, or an engine that has one of its own, has stepped."""
        if self.first_step is not None:
            self.first_step.done()
            self.call = self.first_step.call
            self.first_step = None

    def weights_changed(self, device: torch.device) -> None:
        """Weights on ``device`` were written to by what the current stream has been given so far."""
        if device.type != "cpu":
            self.weights_ready = torch.Event(device)
            self.weights_ready.record()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` in host memory, for another thread than the one that trains.

        On a stream of its own, behind the last change of weights: the main stream may be waiting for the very rank that
        asks.
        """
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.clone()
        module = torch.get_device_module(tensor.device)
        stream = module.Stream(device=tensor.device)
        with module.stream(stream):
            if self.weights_ready is not None:
                stream.wait_event(self.weights_ready)
            return tensor.cpu()
