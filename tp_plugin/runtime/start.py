"""Builds the Runtime of a process, part by part in order, and ends it."""

from __future__ import annotations

import atexit

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.mesh.hosts import tell_place
from tp_plugin.mesh.roles import Mesh, build_mesh
from tp_plugin.runtime import crash_report as reports
from tp_plugin.runtime.crash_report import CrashReport
from tp_plugin.runtime.digests import Vouched
from tp_plugin.runtime.farewell import Farewell
from tp_plugin.runtime.hang_report import HangReport
from tp_plugin.runtime.joint_reads import JointReads
from tp_plugin.runtime.last_micro_batch import LastMicroBatch
from tp_plugin.runtime.mutual_wait import MutualWait
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.published import PublishedTensors
from tp_plugin.runtime.remote_logits import RemoteLogits
from tp_plugin.runtime.runtime import Runtime, slot
from tp_plugin.runtime.sessions import Sessions
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.runtime.transport import PeerTransport
from tp_plugin.runtime.world_wait import WorldWait
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.replicas import ReplicaSums


def build(config: RunConfig, mesh: Mesh) -> Runtime:
    """A Runtime on the groups of ``mesh``. Collective over the unit."""
    tell_place(mesh.rank, mesh.devices.device_type)
    progress = Progress()
    transport = PeerTransport(mesh)
    published = PublishedTensors(transport, progress)
    last_micro_batch = LastMicroBatch(mesh)
    sync_points = SyncPoints(mesh, published, last_micro_batch)
    sessions = Sessions(mesh, transport, sync_points, last_micro_batch, config.save_timeout)
    joint_reads = JointReads(mesh, transport, published, sessions)
    world_wait = WorldWait(mesh, sessions, reports.read, config.save_timeout)
    remote_logits = RemoteLogits(mesh, transport, sync_points, progress)
    hang_report = HangReport(mesh, transport, sync_points, sessions, reports.read)
    crash_report = CrashReport(mesh.rank, hang_report)
    mutual_wait = MutualWait(mesh, transport, reports.leave)
    farewell = Farewell(mesh, sessions, sync_points, crash_report)
    atexit.register(farewell)
    return Runtime(
        config=config,
        mesh=mesh,
        progress=progress,
        region=ScriptRegion(),
        replica_sums=ReplicaSums(),
        last_micro_batch=last_micro_batch,
        vouched=Vouched(),
        transport=transport,
        published=published,
        sync_points=sync_points,
        sessions=sessions,
        joint_reads=joint_reads,
        world_wait=world_wait,
        remote_logits=remote_logits,
        hang_report=hang_report,
        crash_report=crash_report,
        mutual_wait=mutual_wait,
        farewell=farewell,
    )


def start(config: RunConfig, tp_size: int | None = None, device_type: str | None = None) -> Runtime:
    """The Runtime of this process, built at the first call. Collective over the world.

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
        if running.mesh.pp_size != config.pp_size:
            raise TPError(
                f"pp_size={config.pp_size} was asked for, but this run already has pp_size={running.mesh.pp_size}; all "
                "models of a run share one pp_size"
            )
        if running.mesh.tp_size != tp_size:
            raise TPError(
                f"tp_size={tp_size} was asked for, but this run already has tp_size={running.mesh.tp_size}; all models "
                "of a run share one tp_size"
            )
        return running
    stop()
    mesh = build_mesh(tp_size, device_type, slot.world_groups, config.pp_size)
    slot.runtime, slot.world_groups = build(config, mesh), mesh.made
    return slot.runtime


def stop() -> None:
    """End the Runtime, if there is one: its threads, and what it registered. A later one uses its groups again."""
    running, slot.runtime = slot.runtime, None
    if running is not None:
        atexit.unregister(running.farewell)
        running.crash_report.close()
        running.hang_report.close()
        running.mutual_wait.close()
        running.transport.close()
