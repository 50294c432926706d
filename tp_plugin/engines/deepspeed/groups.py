"""The groups DeepSpeed works in, and its collectives: counted like our own, and none over a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.parallel.mesh import Group, Mesh, alone, current_mesh, entry


class Mpu:
    """Megatron's model-parallel unit as DeepSpeed reads it (``deepspeed.initialize(mpu=…)``, utils/groups.py).

    It has no ``initialize_sequence_parallel``: DeepSpeed takes an mpu with that name for Ulysses' and ignores the rest.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.tp.pg

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        # a real group also when it has one member: None would be the world
        return self.mesh.dp.pg if self.mesh.dp_size > 1 else alone()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.mesh.dp.ranks)


_CARRIED = {
    "all_reduce": 0,
    "all_reduce_coalesced": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_base": 1,
    "all_gather_coalesced": 1,
    "all_to_all_single": 1,
    "gather": 0,
    "scatter": 0,
}
"""Collectives of ``TorchBackend``, and the position of what a rank puts in."""

_OBJECTS = ("broadcast_object_list", "all_gather_object")


def install_backend(torch_backend: Any) -> None:
    """Patch ``deepspeed.comm.torch``."""
    cls = torch_backend.TorchBackend
    for name in (*_CARRIED, *_OBJECTS):
        if name in vars(cls):
            wrap(cls, name, _collective(name))
    wrap(cls, "barrier", _barrier)
    patch(torch_backend, "build_shm_op", lambda: None)


def _collective(name: str) -> Any:
    def call(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = current_mesh()
        if mesh is None:
            return original(self, *args, **kwargs)
        group = _group_of(kwargs.get("group"), mesh)
        if group is not None and group.size == 1:
            _alone(name, *args, **kwargs)
            return _Done() if kwargs.get("async_op") else None
        if group is not None:
            entry(name, group, _bytes(_input(name, args, kwargs)))
        return original(self, *args, **kwargs)

    return call


def _group_of(pg: Any, mesh: Mesh) -> Group | None:
    if pg is None or pg is dist.group.WORLD:
        return mesh.world
    for group in (mesh.tp, mesh.dp, mesh.control):
        if pg is group.pg:
            return group
    ranks = tuple(dist.get_process_group_ranks(pg))
    if ranks == mesh.dp.ranks or len(ranks) == 1:  # ZeRO-3 and checkpoints clone groups
        return mesh.dp if ranks == mesh.dp.ranks else Group("alone", ranks, pg)
    return None


_NAMES = {
    "all_reduce": ("tensor",),
    "all_reduce_coalesced": ("tensors",),
    "reduce": ("tensor",),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_tensor": ("output_tensor", "input_tensor"),
    "broadcast": ("tensor",),
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_base": ("output_tensor", "input_tensor"),
    "all_gather_coalesced": ("output_tensors", "input_tensors"),
    "all_to_all_single": ("output", "input"),
    "gather": ("tensor", "gather_list"),
    "scatter": ("tensor", "scatter_list"),
    "broadcast_object_list": ("object_list",),
    "all_gather_object": ("object_list", "obj"),
}
"""Parameters of each collective of ``TorchBackend``, as far as data goes."""


def _arguments(name: str, args: Any, kwargs: Any) -> list[Any]:
    names = _NAMES[name]
    return [args[at] if at < len(args) else kwargs.get(key) for at, key in enumerate(names)]


def _input(name: str, args: Any, kwargs: Any) -> Any:
    return None if name in _OBJECTS else _arguments(name, args, kwargs)[_CARRIED[name]]


def _bytes(value: Any) -> int:
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _alone(name: str, *args: Any, **kwargs: Any) -> None:
    """What the collective leaves behind in a group of one."""
    values = _arguments(name, args, kwargs)
    if name in ("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list"):
        return
    if name == "all_gather_object":
        values[0][0] = values[1]
        return
    if name in ("gather", "scatter"):
        tensor, whole = values
        if whole:
            (tensor, source) = (whole[0], tensor) if name == "gather" else (tensor, whole[0])
            tensor.copy_(source)
        return
    outputs, inputs = (value if isinstance(value, list | tuple) else [value] for value in values)
    for output, source in zip(outputs, inputs, strict=True):
        if output.data_ptr() != source.data_ptr():
            output.copy_(source.reshape(output.shape))


class _Done:
    """The handle of a collective that needed no communication."""

    def wait(self, *args: Any) -> None:
        return None

    def is_completed(self) -> bool:
        return True


def _barrier(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    pg = args[0] if args else kwargs.get("group")
    group = _group_of(pg, mesh) if mesh is not None else None
    return None if group is not None and group.size == 1 else original(self, *args, **kwargs)
