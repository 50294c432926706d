"""A head's output on this rank, which other ranks may read for as long as a script here may."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import Leaf


class Held:
    """A head's output (tokens, columns); when the script drops it, ``release(number, (data, ready))`` gets it."""

    def __init__(self, leaf: Leaf, data: torch.Tensor, release: Callable[[Any, Any], None]):
        self.leaf, self.data = leaf, data
        self.ready: torch.Event | None = None
        if data.device.type != "cpu":
            self.ready = torch.Event(data.device)
            self.ready.record()
        # a peer may be behind, and read what is gone here: it stays until all have met in a collective
        weakref.finalize(self, release, leaf.number, (data, self.ready)).atexit = False
