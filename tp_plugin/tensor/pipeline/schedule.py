"""In which order a stage runs the forwards and backwards of its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Step = tuple[Literal["forward", "backward"], int]
"""What is run, and of which micro-batch."""


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> Iterator[Step]:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021, figure 4): at most ``stages - stage`` micro-batches are alive."""
    ahead = min(stages - 1 - stage, micro_batches)
    for number in range(ahead):
        yield "forward", number
    for number in range(micro_batches - ahead):
        yield "forward", number + ahead
        yield "backward", number
    for number in range(micro_batches - ahead, micro_batches):
        yield "backward", number
