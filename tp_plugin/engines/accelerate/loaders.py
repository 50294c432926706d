"""Prepared data loaders: the leader of each TP group iterates, its peers receive.

The leaders run Accelerate's own program for dp processes, random collators and workers included; with each batch a peer
gets what else came of fetching it: the end-of-epoch marks, and the generators' states where fetching drew from them.
Tensors that lie on a device are vouched for: the guard of the forward knows them by the number of this sending.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tp_plugin.engines.accelerate.operations import leaders_only
from tp_plugin.engines.patching import wrap
from tp_plugin.errors import DivergenceError
from tp_plugin.mesh import host_copy
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BATCH
from tp_plugin.tensor import rng


def install(data_loader: Any) -> None:
    """Patch the loaders that ``accelerator.prepare`` returns."""
    wrap(data_loader.DataLoaderShard, "__iter__", _iterate)
    wrap(data_loader.DataLoaderDispatcher, "__iter__", _iterate)


@dataclass
class _Batch:
    """One batch on its way to the peers; tensors on a device follow the message, those of the host lie in it."""

    data: Any
    end_of_dataloader: bool
    remainder: int
    generators: dict[str, Any] | None
    state: dict[str, Any] | None


@dataclass
class _End:
    """The iteration is over (``error``: because the leader's data set raised)."""

    iteration: int
    generators: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class _OnDevice:
    shape: torch.Size
    dtype: torch.dtype


def _iterate(original: Any, self: Any) -> Iterator[Any]:
    mesh = current_mesh()
    if mesh is None:
        return original(self)  # type: ignore[no-any-return]
    return _lead(original, self, mesh) if mesh.is_leader else _follow(self, mesh)


def _lead(original: Any, loader: Any, mesh: Mesh) -> Iterator[Any]:
    with contextlib.closing(original(loader)) as batches:
        while True:
            before = rng.fingerprint()
            try:
                with leaders_only():
                    batch = next(batches)
            except StopIteration:
                _send(mesh, _End(loader.iteration, _changed(before)))
                return
            except Exception as error:
                _send(mesh, _End(loader.iteration, None, f"{type(error).__name__}: {error}"))
                raise
            tensors: list[torch.Tensor] = []
            data = _detach_device_tensors(batch, tensors)
            marks = loader.end_of_dataloader, loader.remainder, _changed(before), _position(loader)
            if _send(mesh, _Batch(data, *marks)):
                for tensor in tensors:
                    mesh.tp.broadcast(tensor.contiguous())
                _vouch_for(tensors)
            yield batch


def _follow(loader: Any, mesh: Mesh) -> Iterator[Any]:
    loader.begin()
    while True:
        require().sync_points.rendezvous(BATCH)
        message = mesh.unit_cpu.broadcast_object(None)
        if message.generators is not None:
            rng.restore(message.generators)
        if isinstance(message, _End):
            if message.error is not None:
                raise DivergenceError(f"the data loader failed on rank {mesh.tp.ranks[0]}: {message.error}")
            loader.iteration = message.iteration
            loader.end()
            return
        loader.end_of_dataloader = message.end_of_dataloader
        loader.remainder = message.remainder
        if message.state is not None:  # `save_state` writes it on every rank
            loader.dl_state_dict = message.state
        yield _receive_device_tensors(message.data, loader, mesh)


def _send(mesh: Mesh, message: Any) -> bool:
    """Send to the peers; False if none is at this loader (the main process iterates alone)."""
    if len(require().sync_points.rendezvous(BATCH)) < mesh.tp_size:
        return False
    mesh.unit_cpu.broadcast_object(message)
    return True


def _vouch_for(tensors: list[torch.Tensor]) -> None:
    """Of the tensors of a batch, in order, on all ranks."""
    runtime = require()
    runtime.vouched.add(tensors, runtime.sync_points.clock)


def _position(loader: Any) -> dict[str, Any] | None:
    """Of a StatefulDataLoader: what it would go on from after this batch."""
    return loader.dl_state_dict if getattr(loader, "use_stateful_dataloader", False) else None


def _changed(before: int) -> dict[str, Any] | None:
    return rng.snapshot() if rng.fingerprint() != before else None


def _detach_device_tensors(batch: Any, tensors: list[torch.Tensor]) -> Any:
    from accelerate.utils import recursively_apply

    def take(tensor: torch.Tensor) -> Any:
        if host_copy.is_on_host(tensor):
            return tensor
        tensors.append(tensor)
        return _OnDevice(tensor.shape, tensor.dtype)

    return recursively_apply(take, batch)


def _receive_device_tensors(data: Any, loader: Any, mesh: Mesh) -> Any:
    from accelerate.state import PartialState
    from accelerate.utils import recursively_apply

    device = getattr(loader, "device", None) or PartialState().device

    tensors: list[torch.Tensor] = []

    def fill(slot: _OnDevice) -> torch.Tensor:
        tensors.append(mesh.tp.broadcast(torch.empty(slot.shape, dtype=slot.dtype, device=device)))
        return tensors[-1]

    filled = recursively_apply(fill, data, test_type=lambda value: isinstance(value, _OnDevice))
    _vouch_for(tensors)
    return filled
