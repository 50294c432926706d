"""What ranks are to each other, on torch's DeviceMesh: the only place that knows how ranks are numbered.

A unit is the set of ranks that hold one model. Its ranks are neighbours, TP innermost: rank s * tp + t of a unit is TP
rank t of stage s.

    world     every rank
    tp        split one tensor
    pp        hold different layers: this rank's place in every stage of its unit
    unit      together are one process to the script; the TP group where there is one stage
    unit_cpu  the unit on gloo: headers, objects and states in host memory
    data      the script's processes: this rank's place in every unit
    grad      average a gradient; today the data group
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import CommContext, Group


class WorldGroups:
    """What was made of one world: each device mesh and each set of groups once, also for a later :class:`Mesh`.

    torch finds device meshes by equality: a gradient's DTensor may carry an older one that was equal, whose groups must
    still be there.

    The groups of a device mesh are split off in one call where the backend can (NCCL bound to a device). All others
    take one call per unit, which every rank of the world makes. (``use_local_synchronization`` would need fewer, but
    names a group by the number of groups that a rank has seen, which differs once a script has made some of its own.)
    """

    def __init__(self) -> None:
        self.waits = itertools.count()  # for all ranks (runtime/world_wait.py): keys of the world's store
        self._world: dist.ProcessGroup | None = None
        self._devices: dict[tuple[str, int, int], DeviceMesh] = {}
        self._groups: dict[tuple[object, ...], dist.ProcessGroup | None] = {}

    def devices(self, device_type: str, tp_size: int, pp_size: int = 1) -> DeviceMesh:
        """The mesh with the dimensions ``data``, ``pp`` and ``tp``. Collective over the world at its first call."""
        self._follow_world()
        key = device_type, tp_size, pp_size
        if key not in self._devices:
            backend = dist.get_backend()  # named, so that no dimension shares the world's own group
            self._devices[key] = init_device_mesh(
                device_type,
                (dist.get_world_size() // (tp_size * pp_size), pp_size, tp_size),
                mesh_dim_names=("data", "pp", "tp"),
                backend_override={"data": backend, "pp": backend, "tp": _ahead_of_others(backend)},
            )
        return self._devices[key]

    def group(self, one_per_unit: Sequence[Sequence[int]], backend: str, number: int = 0) -> dist.ProcessGroup | None:
        """This rank's of some disjoint groups; None if it is in none. Collective over the world at its first call.

        Args:
            number: tells apart groups of the same ranks.
        """
        self._follow_world()
        key = tuple(tuple(ranks) for ranks in one_per_unit), backend, number
        if key not in self._groups:
            made = [dist.new_group(list(ranks), backend=backend, timeout=world_timeout()) for ranks in one_per_unit]
            inside = [dist.get_rank() in ranks for ranks in one_per_unit]
            self._groups[key] = made[inside.index(True)] if any(inside) else None
        return self._groups[key]

    def _follow_world(self) -> None:
        if self._world is not dist.group.WORLD:
            self._world, self._devices, self._groups = dist.group.WORLD, {}, {}


@dataclass
class Mesh:
    """The groups of this rank, by role.

    Attributes:
        tp_size: ranks that split one tensor.
        dp_size: units, which are the script's processes.
        devices: torch's mesh with the dimensions ``data``, ``pp`` and ``tp``.
        pp: the same TP rank of all stages, in their order; activations go forward in it.
        pp_back: the same ranks, for gradients that go back: a queue of its own, as NCCL runs a group's in order.
        context: statistics of all groups, and the collective that this rank is in.
    """

    tp_size: int
    dp_size: int
    tp: Group
    unit: Group
    unit_cpu: Group
    data: Group
    grad: Group
    world: Group
    devices: DeviceMesh
    context: CommContext
    pp: Group
    pp_back: Group
    made: WorldGroups = field(default_factory=WorldGroups)
    _replicas: dict[tuple[int, ...], Group] = field(default_factory=dict)

    @property
    def pp_size(self) -> int:
        """Pipeline stages of a model."""
        return self.pp.size

    @property
    def alike(self) -> tuple[Sequence[int], Sequence[int]]:
        """Ranks of the unit that may hold the same weights as this one: its stage's; the TP rank's of both end stages.

        A weight that is tied over pipeline stages lies on the first and the last.
        """
        first = self.pp.rank * self.tp_size
        ends = (self.tp.rank, self.unit_size - self.tp_size + self.tp.rank)
        return range(first, first + self.tp_size), ends if self.pp_size > 1 else ends[:1]

    @property
    def unit_size(self) -> int:
        """Ranks that hold one model."""
        return self.unit.size

    @property
    def rank(self) -> int:
        """This rank in the world."""
        return self.world.rank

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its unit."""
        return self.unit.rank == 0

    def leader_of(self, process: int) -> int:
        """The global rank that speaks for the script's process ``process``."""
        return leader_of(process, self.unit_size)

    def unit_for(self, tensor: torch.Tensor) -> Group:
        """The unit on a backend that takes ``tensor``: NCCL takes no host memory."""
        return self.unit_cpu if tensor.device.type == "cpu" else self.unit

    def replicas(self, unit_ranks: Sequence[int]) -> Group:
        """The group of these ranks of this unit. Collective over the world at its first call with a value."""
        key = tuple(unit_ranks)
        if key not in self._replicas:
            self._replicas[key] = self._make_replicas(key)
        return self._replicas[key]

    def _make_replicas(self, unit_ranks: tuple[int, ...]) -> Group:
        here = self.unit.rank in unit_ranks
        stage = unit_ranks[0] // self.tp_size * self.tp_size
        if unit_ranks == tuple(range(stage, stage + self.tp_size)):
            return self.tp if here else self._elsewhere()
        if len(unit_ranks) == self.unit_size:
            return self.unit
        units = self.devices.mesh.flatten(1).tolist()
        pg = self.made.group([[unit[r] for r in unit_ranks] for unit in units], dist.get_backend())
        if not here:
            return self._elsewhere()
        return Group("replicas", [self.unit.ranks[r] for r in unit_ranks], pg, self.context)

    def _elsewhere(self) -> Group:
        return Group("elsewhere", [self.rank], None, self.context)

    def is_alive(self) -> bool:
        """Whether torch.distributed still knows the groups: not after ``destroy_process_group`` and another init."""
        return dist.is_initialized() and self.world.pg is dist.group.WORLD


def build_mesh(tp_size: int, device_type: str | None = None, made: WorldGroups | None = None, pp_size: int = 1) -> Mesh:
    """Make the groups of ``tp_size`` × ``pp_size`` × data-parallel ranks. Collective over the world.

    Args:
        tp_size: ranks of a TP group.
        device_type: where tensors of device groups lie; default the accelerator that the world's backend serves, else
            ``cpu``.
        made: what an earlier mesh of this world has made.
        pp_size: pipeline stages of a model.

    Raises:
        TPError: torch.distributed is not initialised, or the unit's size does not divide the world.
    """
    if not dist.is_initialized():
        raise TPError(
            f"tp_size={tp_size} needs an initialised torch.distributed with a multiple of {tp_size * pp_size} "
            "processes; start the script with `accelerate launch` or `torchrun`"
        )
    world = dist.get_world_size()
    check_world(tp_size, world, pp_size)
    made = made or WorldGroups()
    devices = made.devices(device_type or _device_type(), tp_size, pp_size)
    context = CommContext()

    def role(name: str, dimension: str, is_unit: bool = False) -> Group:
        pg = devices.get_group(dimension)
        timeout = world_timeout()
        if timeout is not None:
            _set_pg_timeout(timeout, pg)
        return Group(name, dist.get_process_group_ranks(pg), pg, context, is_unit)

    tp, data = role("tp", "tp", is_unit=pp_size == 1), role("data", "data")
    units = devices.mesh.flatten(1).tolist()
    host = made.group(units, "gloo") if len(units[0]) > 1 else None
    unit = tp
    if pp_size > 1:
        mine = next(ranks for ranks in units if dist.get_rank() in ranks)
        unit = Group("unit", mine, made.group(units, dist.get_backend()), context)
    pp = role("pp", "pp")
    lines = devices.mesh.transpose(1, 2).flatten(0, 1).tolist()  # the ranks of each such group
    back = Group("pp_back", pp.ranks, made.group(lines, dist.get_backend(), number=1) if pp_size > 1 else None, context)
    everyone = Group("world", range(world), dist.group.WORLD, context)
    unit_cpu = Group("unit_cpu", unit.ranks, host, context)
    return Mesh(tp_size, data.size, tp, unit, unit_cpu, data, data, everyone, devices, context, pp, back, made)


def check_world(tp_size: int, world: int, pp_size: int = 1) -> None:
    """Raise TPError if ``world`` ranks are not a whole number of units."""
    size = tp_size * pp_size
    if tp_size < 1 or world % size:
        by = "tp_size" if pp_size == 1 else "tp_size x pp_size"
        asked = f"tp_size={tp_size}" if pp_size == 1 else f"tp_size={tp_size} x pp_size={pp_size}"
        raise TPError(
            f"{asked} does not divide the world of {world} processes (num_processes); write num_processes = "
            f"{by} x data-parallel size, for example {size * max(1, round(world / max(size, 1)))}"
        )


def process_of(rank: int, unit_size: int) -> int:
    """The index of the script's process that global ``rank`` belongs to; needs no groups."""
    return rank // unit_size


def leader_of(process: int, unit_size: int) -> int:
    """The global rank that speaks for the script's process ``process``; needs no groups."""
    return process * unit_size


def _ahead_of_others(backend: str) -> Any:
    """``backend`` with streams of high priority, where it is NCCL, for groups on whose sums products wait.

    A sum is launched before the products that it runs beside, but a GPU may begin with those. Its stream's priority
    brings it forward, and leaves other groups' prefetches (FSDP2, ZeRO-3) where they are, unlike one queue for all
    (``CUDA_DEVICE_MAX_CONNECTIONS=1``).
    """
    if "nccl" not in backend:
        return backend
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = world_timeout() or options._timeout
    return backend, options


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    try:
        served = dist.group.WORLD._get_backend(accelerator).name() != "gloo"  # type: ignore[union-attr]
    except RuntimeError:
        return "cpu"  # this world has no backend for the device
    return accelerator.type if served else "cpu"


def world_timeout() -> datetime.timedelta | None:
    """The timeout that the script gave to ``init_process_group``: new groups fall back to 30 minutes, not to that."""
    pg: Any = dist.group.WORLD
    for device in filter(None, (torch.device("cpu"), torch.accelerator.current_accelerator())):
        try:
            timeout: datetime.timedelta = pg._get_backend(device).options._timeout
            return timeout
        except (RuntimeError, AttributeError):
            continue  # this world has no backend for that device
    return None
