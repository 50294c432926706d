"""One rank of a tensor-parallel world, without the others: PyTorch's fake process group does the talking.

What the rank computes, keeps and sends is what it would among its peers; only the sums are wrong.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tp_plugin.config.run_config import RunConfig
from tp_plugin.mesh.groups import CommContext, Group
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime import start
from tp_plugin.runtime.runtime import slot
from tp_plugin.runtime.start import build, stop


class _Echo(Group):
    """A control group whose other ranks say what this one says."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone() for _ in range(self.size)]

    def all_gather_while(self, tensor: torch.Tensor, reason: Any) -> list[torch.Tensor]:
        return self.all_gather(tensor)

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return tensor

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size


def enter(tp: int) -> Mesh:
    """Be rank 0 of a world of ``tp`` ranks, one TP group; replaces the world that there was."""
    if dist.is_initialized():
        stop()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    return use(mesh_of(tp))


def mesh_of(tp: int) -> Mesh:
    """The groups of rank 0 of ``tp`` ranks; more than one mesh may stand in one world, and one is in use."""
    ranks, context, pg = range(tp), CommContext(), dist.group.WORLD
    group, me = Group("tp", ranks, pg, context), Group("data", (0,), None, context)
    unit_cpu = _Echo("unit_cpu", ranks, pg, context)
    devices: Any = types.SimpleNamespace(device_type="cpu")  # of torch's own mesh nothing else is asked here
    return Mesh(tp, 1, group, group, unit_cpu, me, me, Group("world", ranks, pg, context), devices, context, me, me)


def use(groups: Mesh) -> Mesh:
    """Have what runs next run on this mesh."""
    stop()
    start.tell_place = lambda rank, device_type: None  # a FakeStore keeps nothing
    slot.runtime = build(RunConfig(groups.tp_size, report=False), groups)
    return groups
