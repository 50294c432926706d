"""``deepspeed_io``: the leader of each unit iterates, its peers receive, as with Accelerate's loaders."""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.errors import DivergenceError
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BATCH
from tp_plugin.tensor import rng


def install(dataloader: Any) -> None:
    """Patch ``deepspeed.runtime.dataloader``."""
    wrap(dataloader.DeepSpeedDataLoader, "__iter__", _iter)
    wrap(dataloader.DeepSpeedDataLoader, "__next__", _next)


def _iter(original: Any, self: Any) -> Any:
    mesh = current_mesh()
    return original(self) if mesh is None or mesh.is_leader else self


def _next(original: Any, self: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self)
    sync_points = require().sync_points
    if mesh.is_leader:
        before = rng.fingerprint()
        batch, error = None, None
        try:
            batch = original(self)
        except Exception as raised:
            error = raised
        together = len(sync_points.rendezvous(BATCH)) == mesh.unit_size
        if together:
            drawn = rng.snapshot() if rng.fingerprint() != before else None
            mesh.unit_cpu.broadcast_object((batch, None if error is None else repr(error), drawn))
        if error is not None:
            raise error
        return batch
    if self.tput_timer:
        self.tput_timer.start()
    sync_points.rendezvous(BATCH)
    batch, problem, drawn = mesh.unit_cpu.broadcast_object(None)
    if drawn is not None:
        rng.restore(drawn)
    if problem is not None and problem.startswith("StopIteration"):
        raise StopIteration
    if problem is not None:
        raise DivergenceError(f"the data loader failed on rank {mesh.unit.ranks[0]}: {problem}")
    return batch
