"""Dropout masks that depend on the layer and the micro-batch, not on the stage: one and several stages draw the same.

Inside of a pipelined forward, each layer of each micro-batch begins with a generator seeded by the script's; afterwards
the script's has drawn one number, on every stage.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.tensor.generators import DefaultGenerator
from tp_plugin.tensor.graphs import disable

Seed = tuple[torch.device, int] | None
"""The device whose generator is seeded, and from what; None: none is."""


class Seeds:
    """Seeds the generator of the model's device.

    Attributes:
        micro_batch: the one that runs.
    """

    def __init__(self) -> None:
        self.micro_batch = 0
        self._seed: Seed = None

    @contextlib.contextmanager
    def around(self, device: torch.device, draws: bool) -> Iterator[Seed]:
        """Around a pipelined forward; seeds nothing where nothing ``draws``. Gives what :meth:`again` takes."""
        if not draws:
            yield None
            return
        generator = DefaultGenerator(device)
        before = generator.get()
        seed = device, int.from_bytes(hashlib.blake2b(before.numpy().tobytes(), digest_size=8).digest(), "little")
        generator.advance()
        after = generator.get()
        try:
            with self.again(seed):
                yield seed
        finally:
            generator.set(after)

    @contextlib.contextmanager
    def again(self, seed: Seed) -> Iterator[None]:
        """Around a backward that may compute layers again: they draw what they drew."""
        outer, self._seed = self._seed, seed
        try:
            yield
        finally:
            self._seed = outer

    def start(self) -> None:
        """Before the layers."""
        self._begin("start")

    def before_layer(self, number: int) -> Any:
        """A forward pre-hook of layer ``number``."""

        place = str(number)  # a graph of the layer takes it for a constant

        def hook(layer: nn.Module, args: Any) -> None:
            self._begin(place)

        return hook

    def _begin(self, place: str) -> None:
        if self._seed is not None:
            self._start_with(*self._seed, place)

    @disable
    def _start_with(self, device: torch.device, base: int, place: str) -> None:
        key = f"{base}/{self.micro_batch}/{place}".encode()
        DefaultGenerator(device).seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
