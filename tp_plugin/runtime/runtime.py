"""One Runtime per process: it owns what makes the ranks of a unit look like one process, and is built here in order."""

from __future__ import annotations

import atexit
from typing import Any
from weakref import WeakSet

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh, build_mesh
from tp_plugin.runtime import crash_report
from tp_plugin.runtime.crash_report import CrashReport
from tp_plugin.runtime.current import slot
from tp_plugin.runtime.farewell import Farewell
from tp_plugin.runtime.hang_report import HangReport
from tp_plugin.runtime.last_loss import LastLoss
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.published import PublishedTensors
from tp_plugin.runtime.remote_logits import RemoteLogits
from tp_plugin.runtime.sessions import Sessions
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.runtime.transport import PeerTransport


class Runtime:
    """The parts of one process, each handed what it needs. Collective over the world when made."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.progress = Progress()
        self.last_loss = LastLoss()
        self.transport = PeerTransport(mesh)
        self.published = PublishedTensors(self.transport, self.progress)
        self.sync_points = SyncPoints(mesh, self.published)
        self.sessions = Sessions(mesh, self.transport, self.sync_points)
        self.remote_logits = RemoteLogits(mesh, self.transport, self.sync_points)
        self.hang_report = HangReport(mesh, self.transport, self.sync_points, self.sessions, crash_report.read)
        self.crash_report = CrashReport(mesh.rank, self.hang_report)
        self.farewell = Farewell(mesh, self.sessions, self.sync_points, self.crash_report)
        self.models: WeakSet[Any] = WeakSet()
        """Records of the sharded models of this process (:class:`tp_plugin.shard.model_state.ModelState`)."""
        self.held_bytes = self.full_bytes = 0
        """Bytes of parameters that this process ever sharded: what it holds of them, and the full tensors'."""
        atexit.register(self.farewell)

    def close(self) -> None:
        """End the threads and take back what was registered with the process; the groups stay."""
        atexit.unregister(self.farewell)
        self.crash_report.close()
        self.hang_report.close()
        self.transport.close()


def start(config: RunConfig, tp_size: int | None = None, device_type: str | None = None) -> Runtime:
    """The Runtime of this process, made at the first call. Collective over the world.

    Args:
        config: what the user wrote.
        tp_size: ranks of a TP group; default ``config.tp_size``.
        device_type: where tensors lie (:func:`tp_plugin.mesh.roles.build_mesh`).

    Raises:
        TPError: torch.distributed is not initialised, ``tp_size`` does not divide the world, or is not that of the
            Runtime which exists.
    """
    tp_size = tp_size or config.tp_size
    running = slot.runtime
    if running is not None and running.mesh.is_alive():
        if running.mesh.tp_size != tp_size:
            raise TPError(
                f"tp_size={tp_size} was asked for, but this run already has tp_size={running.mesh.tp_size}; all models "
                "of a run share one tp_size"
            )
        return running
    if running is not None:
        running.close()
    mesh = build_mesh(tp_size, device_type, slot.local_groups)
    slot.runtime, slot.local_groups = Runtime(config, mesh), mesh.local_groups
    return slot.runtime


def stop() -> None:
    """End the Runtime and its process groups, if there is one. Collective over the world."""
    running, slot.runtime = slot.runtime, None
    if running is not None:
        running.close()
        running.mesh.close()
