"""How the first optimizer step went: time, tokens per second, memory. Waits for the device once, when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from tp_plugin.mesh.roles import Mesh


class FirstStep:
    """Told of each training forward (:meth:`forward`) and of the step (:meth:`done`); looks at shapes only.

    Args:
        say: whether this rank prints.

    Attributes:
        call: samples and tokens of a micro-batch, and how many there were.
    """

    def __init__(self, mesh: Mesh, say: bool):
        self._mesh, self._say = mesh, say
        self._began: float | None = None
        self._tokens = self._forwards = 0
        self.call = (0, 0, 0)

    def forward(self, values: Iterable[Any]) -> None:
        """A training forward of these inputs begins."""
        self._began = self._began or time.monotonic()
        self._forwards += 1
        samples, length = next((value.shape[:2] for value in values if _is_sequence(value)), (0, 0))
        self._tokens += samples * length
        self.call = samples, length, self._forwards

    def done(self) -> None:
        """The optimizer has stepped."""
        if self._began is None or not self._say:
            return
        if on_device := self._mesh.devices.device_type != "cpu":
            torch.accelerator.synchronize()
            peak = torch.accelerator.max_memory_allocated()
        else:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = time.monotonic() - self._began
        speed = f", {self._tokens / seconds / self._mesh.unit.size:,.0f} tokens/s per rank" if self._tokens else ""
        memory = "device memory" if on_device else "host memory"
        batches = "1 micro-batch" if self._forwards == 1 else f"{self._forwards} micro-batches"
        print(
            f"tp_plugin: the first optimizer step took {seconds:.1f} s ({batches}){speed}; "
            f"at most {peak / 2**30:.2f} GiB of {memory} on rank 0. Later steps are faster.",
            file=sys.stderr,
            flush=True,
        )


def size(count: float) -> str:
    """Bytes in words."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _is_sequence(value: Any) -> bool:
    """Whether a forward's input has a row of tokens for each sample."""
    return isinstance(value, torch.Tensor) and value.dim() >= 2
