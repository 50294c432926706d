"""How large the blocks are in which deferred values are computed: by the bytes that they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch


class BlockSizes(NamedTuple):
    """What blocks are allowed to take.

    Attributes:
        share: bytes of a block's temporaries, as a share of those of the rank's logits.
        least: bytes of a block that is not worth dividing, however small that share is.
    """

    share: float
    least: int


ON_CPU = BlockSizes(0.1, 1 << 18)
"""Blocks stay in a core's cache; computing many costs nothing."""
ON_DEVICE = BlockSizes(0.167, 1 << 25)
"""Few blocks: each is some launches of kernels, and small ones leave the device idle."""


def on_device(device: torch.device) -> bool:
    """Whether computing is launching kernels; on the meta device, where nothing is computed, it is not."""
    return device.type not in ("cpu", "meta")


def pieces(lines: int, width: int, stored: int, cost: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of ``lines`` rows (or columns) of ``width`` elements, each range a block to compute at once.

    Args:
        stored: bytes that an element of the logits takes in memory.
        cost: bytes of temporaries that computing an element takes; with 0 there is one block.
    """
    sizes = ON_DEVICE if on_device(device) else ON_CPU
    budget = max(sizes.share * stored * lines * width, sizes.least)
    count = max(math.ceil(lines * width * cost / budget), 1)
    step = max(-(-lines // count), 1)
    return ((first, min(first + step, lines)) for first in range(0, lines, step))
