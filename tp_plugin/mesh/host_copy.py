"""Tensors of a device whose values the host needs: they are copied behind what the device has yet to do.

Nothing waits for such a copy when it is made. It is used later, when the device has long finished it.
"""

from __future__ import annotations

import torch


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether the host can read ``tensor`` without waiting for a device. (Call it by its module: tests replace it.)"""
    return tensor.device.type == "cpu"


class HostCopy:
    """A tensor on its way to host memory, in the order of the current stream; one of the host is there at once."""

    def __init__(self, tensor: torch.Tensor):
        self._event: torch.Event | None = None
        self._copy = tensor.detach()
        if not is_on_host(tensor):
            self._copy = self._copy.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.Event(tensor.device)
            self._event.record()

    @property
    def is_late(self) -> bool:
        """Whether it comes from a device, so that reading it now would wait for what the device has to do before."""
        return self._event is not None

    def value(self) -> torch.Tensor:
        """The values; waits for the copy. Any thread may ask."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
