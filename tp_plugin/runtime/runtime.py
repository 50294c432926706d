"""The Runtime: one object per process that owns what makes the ranks of a unit look like one process.

It is built by :func:`tp_plugin.runtime.start.start`, and is the only module-level state of the package. Code that
somebody else calls and that therefore cannot be handed it (patched functions of other libraries, torch's hooks) asks
:func:`current`; everything below the engines gets what it needs when it is made. Imports next to nothing: asking is
free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from tp_plugin.errors import TPError

if TYPE_CHECKING:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.mesh.roles import Mesh, WorldGroups
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
    from tp_plugin.runtime.sessions import Sessions
    from tp_plugin.runtime.sync_points import SyncPoints
    from tp_plugin.runtime.transport import PeerTransport
    from tp_plugin.runtime.world_wait import WorldWait
    from tp_plugin.tensor.global_view import ScriptRegion
    from tp_plugin.tensor.replicas import ReplicaSums


@dataclass(eq=False)
class Runtime:
    """The parts of one process.

    Attributes:
        config: what the user wrote.
        mesh: the groups by role.
        progress: how far this process has trained.
        region: whether the script runs, to which parameters look whole, or a step does.
        replica_sums: gradients that the backward under way has yet to sum over ranks.
        last_micro_batch: what the ranks have yet to compare of it.
        vouched: tensors of a device that the leader sent.
        transport: messages between the ranks of the unit.
        published: what other ranks may read here.
        sync_points: where the ranks of the unit meet.
        sessions: calls that they leave together.
        joint_reads: shards that are gathered in such calls.
        world_wait: where all units wait for one that saves.
        remote_logits: logits that other ranks hold.
        hang_report, crash_report: what is said of waits and deaths.
        mutual_wait: ends a wait that nothing can end.
        farewell: what happens at exit.
        models: the states of this process's sharded models (:class:`tp_plugin.shard.model_state.ModelState`).
        reported: whether the run has been announced.
        held_bytes, full_bytes: of all parameters that it ever sharded: what it holds of them, and the full tensors'.
    """

    config: RunConfig
    mesh: Mesh
    progress: Progress
    region: ScriptRegion
    replica_sums: ReplicaSums
    last_micro_batch: LastMicroBatch
    vouched: Vouched
    transport: PeerTransport
    published: PublishedTensors
    sync_points: SyncPoints
    sessions: Sessions
    joint_reads: JointReads
    world_wait: WorldWait
    remote_logits: RemoteLogits
    hang_report: HangReport
    crash_report: CrashReport
    mutual_wait: MutualWait
    farewell: Farewell
    models: WeakSet[Any] = field(default_factory=WeakSet)
    reported: bool = False
    held_bytes: int = 0
    full_bytes: int = 0


class _Slot:
    """What a process has: its Runtime, and the groups that the next one uses again."""

    runtime: Runtime | None = None
    world_groups: WorldGroups | None = None


slot = _Slot()


def current() -> Runtime | None:
    """The Runtime of this process, or None before it is started."""
    return slot.runtime


def require() -> Runtime:
    """The Runtime of this process.

    Raises:
        TPError: it has not been started.
    """
    if slot.runtime is None:
        raise TPError("no tensor-parallel run in this process yet; call tp_plugin.parallelize first")
    return slot.runtime


def current_mesh() -> Mesh | None:
    """The groups of this process by role, or None before the Runtime is started."""
    return None if slot.runtime is None else slot.runtime.mesh
