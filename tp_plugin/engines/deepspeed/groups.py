"""The groups DeepSpeed works in, and its collectives: counted like our own, and none over a group of one.

Bytes that a rank puts into collectives of its DP group per optimizer step, with P bytes of local trainable parameters
(the model's / (tp x pp)), m micro-batches and dp > 1 ranks (ZeRO: Rajbhandari et al. 2020, section 7; DeepSpeed 0.19
reduces by all-reduce in stages 1 and 2, runtime/zero/stage_1_and_2.py). Nothing of it exists at dp = 1.

    stage 0   all-reduce P
    stage 1   all-reduce P, all-gather P / dp
    stage 2   all-reduce m P, all-gather P / dp
    stage 3   reduce-scatter m P, all-gather m P / dp for the forward, and again for the backward of what was released

Beside it: norm and overflow, 4 bytes each. The TP group carries what it carries without ZeRO, and one norm.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.mesh.groups import Group
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import current_mesh


class Mpu:
    """Megatron's model-parallel unit as DeepSpeed reads it (``deepspeed.initialize(mpu=…)``, utils/groups.py).

    It has no ``initialize_sequence_parallel``: DeepSpeed takes an mpu with that name for Ulysses' and ignores the rest.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.unit.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.unit_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.unit.pg

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.data.pg  # a real group also when it has one member: None would be the world

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.mesh.data.ranks)


_DATA = {
    "all_reduce": ("tensor", None),
    "all_reduce_coalesced": ("tensors", None),
    "reduce": ("tensor", None),
    "reduce_scatter": ("input_list", "output"),
    "reduce_scatter_tensor": ("input_tensor", "output_tensor"),
    "broadcast": ("tensor", None),
    "broadcast_object_list": ("object_list", None),
    "all_gather": ("tensor", "tensor_list"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "all_gather_base": ("input_tensor", "output_tensor"),
    "all_gather_coalesced": ("input_tensors", "output_tensors"),
    "all_gather_object": ("obj", "object_list"),
    "all_to_all_single": ("input", "output"),
    "gather": ("tensor", "gather_list"),
    "scatter": ("scatter_list", "tensor"),
    "barrier": (None, None),
}
"""Collectives of ``TorchBackend``: what a rank puts in, and where its result lands if not in the same place."""


def install_backend(torch_backend: Any) -> None:
    """Patch ``deepspeed.comm.torch``."""
    parameters = _parameters(torch_backend)
    for name, (put, result) in _DATA.items():
        wrap(torch_backend.TorchBackend, name, _collective(name, parameters[name], put, result))
    # its shared-memory op for CPUs is compiled at start-up and leaves buffers in /dev/shm
    patch(torch_backend, "build_shm_op", lambda: None)


def _parameters(torch_backend: Any) -> dict[str, list[str]]:
    """Each method's parameters, from the source: its decorators hide the signature."""
    classes = [node for node in ast.parse(inspect.getsource(torch_backend)).body if isinstance(node, ast.ClassDef)]
    backend = next(node for node in classes if node.name == "TorchBackend")
    methods = [node for node in backend.body if isinstance(node, ast.FunctionDef)]
    return {method.name: [argument.arg for argument in method.args.args] for method in methods}


def _collective(name: str, parameters: list[str], put: str | None, result: str | None) -> Any:
    def call(original: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = current_mesh()
        if mesh is None:
            return original(*args, **kwargs)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        group = _group_of(given.get("group"), mesh)
        if group.size == 1:
            if put is not None and result is not None and given.get(result) is not None:
                _copy(given[put], given[result])
            return _Done() if given.get("async_op") else None
        group.record(name, _bytes(given.get(put)) if put is not None else 0)
        return original(*args, **kwargs)

    return call


def _group_of(pg: Any, mesh: Mesh) -> Group:
    if pg is None or pg is dist.group.WORLD:
        return mesh.world
    for group in (mesh.unit, mesh.tp, mesh.data, mesh.unit_cpu):
        if pg is group.pg:
            return group
    ranks = tuple(dist.get_process_group_ranks(pg))  # DeepSpeed clones groups
    return mesh.data if ranks == mesh.data.ranks else Group("other", ranks, pg, mesh.context)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _list(value) if isinstance(t, torch.Tensor))


def _copy(put: Any, result: Any) -> None:
    """What a collective leaves behind in a group of one."""
    for at, (source, target) in enumerate(zip(_list(put), _list(result), strict=False)):
        if not isinstance(source, torch.Tensor):
            result[at] = source
        elif target.data_ptr() != source.data_ptr():
            target.copy_(source.reshape(target.shape))


class _Done:
    """The handle of a collective that needed no communication."""

    def wait(self, *args: Any) -> None:
        """Nothing to wait for."""

    def is_completed(self) -> bool:
        """It is."""
        return True
