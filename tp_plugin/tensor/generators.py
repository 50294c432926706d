"""Default random generators by device: the CPU's, and any accelerator's through torch's module for its device type.

And the streams of their own that ranks draw from for a while.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch

from tp_plugin.errors import TPError


class DefaultGenerator:
    """What draws on ``device`` where no generator is named.

    Raises:
        TPError: torch's module for the device cannot set a generator's state.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._module, self._at = _states_of(device.type), () if device.type == "cpu" else (device,)

    def get(self) -> torch.Tensor:
        """Its state, a tensor in host memory."""
        state: torch.Tensor = self._module.get_rng_state(*self._at)
        return state

    def set(self, state: torch.Tensor) -> None:
        """Go on from what :meth:`get` returned."""
        self._module.set_rng_state(state, *self._at)

    def seed(self, seed: int) -> torch.Tensor:
        """Start anew with ``seed``; returns the state in which it is then."""
        # devices' own `manual_seed` is for the current one only
        state = _another(self.device).manual_seed(seed).get_state()
        self.set(state)
        return state

    def advance(self) -> None:
        """Draw one number."""
        torch.rand(1, device=self.device)


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class OwnStream:
    """A default generator for a while on a stream of its own, seeded by a hash of its state and ``key``."""

    def __init__(self, key: bytes):
        self.key = key
        self._stream: DefaultGenerator | None = None
        self._replicated = self._seeded = self._paused = _NOTHING

    def begin(self, device: torch.device) -> None:
        """Switch ``device`` to it."""
        if self._stream is not None:
            self.end()  # an exception left it on
        self._stream = DefaultGenerator(device)
        self._replicated = self._stream.get()
        digest = hashlib.blake2b(self._replicated.numpy().tobytes(), key=self.key, digest_size=8).digest()
        self._seeded = self._stream.seed(int.from_bytes(digest, "little") >> 1)

    def end(self) -> bool:
        """Switch back, if it is on; returns whether it drew anything."""
        if self._stream is None:
            return False
        stream, self._stream = self._stream, None
        drew = not torch.equal(stream.get(), self._seeded)
        stream.set(self._replicated)
        if drew:
            stream.advance()
        return drew

    def pause(self) -> None:
        """Switch back for a moment, if it is on."""
        if self._stream is not None:
            self._paused = self._stream.get()
            self._stream.set(self._replicated)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        if self._stream is not None:
            self._replicated = self._stream.get()
            self._stream.set(self._paused)


def of_accelerator() -> DefaultGenerator | None:
    """That of the current accelerator; None without one, or before anything has been done on it."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    has_begun = getattr(torch.get_device_module(device), "is_initialized", None)
    return DefaultGenerator(device) if has_begun is None or has_begun() else None


@functools.cache
def _another(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


def _states_of(device_type: str) -> Any:
    """The module with ``get_rng_state`` and ``set_rng_state`` of a device type."""
    if device_type == "cpu":
        return torch
    try:
        module = torch.get_device_module(device_type)
    except RuntimeError:
        module = None
    if not (hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state")):
        raise TPError(
            f"random numbers on the device type {device_type!r}: torch.{device_type} has no get_rng_state and "
            "set_rng_state, by which the ranks of a TP group draw different dropout masks; set the model's dropout to "
            "0, or tp_size: 1"
        )
    return module
