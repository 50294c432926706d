"""What stands for the tensors of a call when ranks compare them: shape, dtype and a checksum, or who vouches for them.

A digest of a tensor on a device comes late: it is copied to the host behind what the device has yet to do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tp_plugin.mesh import host_copy
from tp_plugin.mesh.host_copy import HostCopy

SAMPLE = 1 << 16
"""Elements of a device tensor that are copied to the host for hashing; larger ones are sampled and summed."""

Digest = tuple[tuple[int, ...], str, int]
"""Shape, dtype and checksum."""


class LateDigest:
    """The digest of a tensor as it is now; of a large one on a device, that of its sum and a sample."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype = tuple(tensor.shape), str(tensor.dtype)
        data = tensor.detach()
        self._sum: HostCopy | None = None
        if not host_copy.is_on_host(data) and data.numel() > SAMPLE:
            self._sum = HostCopy(data.sum(dtype=torch.float64 if data.is_floating_point() else torch.int64))
            data = data.reshape(-1)[:: data.numel() // SAMPLE].contiguous()
        self._data = HostCopy(data)

    @property
    def is_late(self) -> bool:
        """Whether reading it now would wait for a device."""
        return self._data.is_late

    def value(self) -> Digest:
        """Shape, dtype and checksum."""
        total = 0.0 if self._sum is None else self._sum.value().item()
        raw = self._data.value().contiguous().reshape(-1).view(torch.uint8).numpy()
        return self.shape, self.dtype, zlib.crc32(raw.data, zlib.crc32(repr(total).encode()))


class Vouched:
    """Tensors of a device that the unit's leader sent to its peers: equal on all ranks for as long as nobody writes."""

    def __init__(self) -> None:
        self._stamps: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def add(self, tensors: Iterable[torch.Tensor], stamp: int) -> None:
        """``tensors``, in order, are what the leader sent; ``stamp`` is of this sending, and equal on all ranks."""
        for place, tensor in enumerate(tensors):
            self._stamps[tensor] = (stamp, place, tensor._version)

    def stamp(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """What tells this tensor from others that were sent; None if it was not, or was written to since."""
        stamp, place, version = self._stamps.get(tensor, (0, 0, None))
        return (stamp, place) if version == tensor._version else None


def digest(tensor: torch.Tensor) -> Digest:
    """Shape, dtype and checksum, now."""
    return LateDigest(tensor).value()


def digests(args: Any, kwargs: Mapping[str, Any]) -> dict[str, Digest]:
    """Those of every tensor among the arguments of a call, by name."""
    return {name: digest(tensor) for name, tensor in tensors_of(args, kwargs).items()}


def tensors_of(args: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor among the arguments of a call, by name."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}" if name else str(key), item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}[{index}]", item)

    walk("args", args)
    # a cache holds each rank's own heads
    walk("", {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache_params")})
    return found


def difference(ranks: Iterable[int], theirs: list[dict[str, Digest]]) -> tuple[str, str] | None:
    """The first name under which ranks have other tensors, and what each has; None if they all have the same."""
    for name in sorted({name for digests in theirs for name in digests}):
        found = [digests.get(name) for digests in theirs]
        if any(each != found[0] for each in found):
            return name, ", ".join(f"rank {rank}: {_show(each)}" for rank, each in zip(ranks, found, strict=True))
    return None


def _show(digest: Digest | None) -> str:
    if digest is None:
        return "absent"
    shape, dtype, checksum = digest
    return f"{dtype} {list(shape)} checksum {checksum:08x}"
