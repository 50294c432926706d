"""``PartialState`` in terms of data-parallel processes.

The distributed type stays what Accelerate made it, also with dp = 1: on ``DistributedType.NO`` transformers would take
all GPUs of the node for this process's own (``cuda:0``, ``nn.DataParallel``), and TRL would spread the model over them.
So one process looks as ``torchrun --nproc_per_node 1`` makes it look: nothing is wrapped in DDP, and only what the TP
group must do together (barriers, triggers) crosses ranks.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from tp_plugin.config.resolve import current_config
from tp_plugin.engines.fsdp2 import config as fsdp2
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.start import start
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.tensor import rng


def install(state: Any) -> None:
    """Patch ``accelerate.state``."""
    partial = state.PartialState
    wrap(partial, "__init__", _init)
    wrap(partial, "wait_for_everyone", _wait_for_everyone)
    for name, speaks in {
        "is_main_process": lambda self, mesh: mesh.is_leader,
        "is_last_process": lambda self, mesh: mesh.is_leader,
    }.items():
        patch(partial, name, _property(vars(partial)[name], speaks))
    wrap(partial, "on_main_process", _only(lambda self, index: self.is_main_process))
    wrap(partial, "on_local_main_process", _only(lambda self, index: self.is_local_main_process))
    wrap(partial, "on_last_process", _only(lambda self, index: self.is_last_process))
    wrap(partial, "on_process", _only(lambda self, index: self.process_index == index and _leads()))
    wrap(partial, "on_local_process", _only(lambda self, index: self.local_process_index == index))


def _leads() -> bool:
    mesh = current_mesh()
    return mesh is None or mesh.is_leader


def _property(original: property, speaks: Any) -> property:
    def getter(self: Any) -> bool:
        mesh = current_mesh()
        return bool(original.fget(self)) and (mesh is None or speaks(self, mesh))  # type: ignore[misc]

    return property(getter, doc=original.__doc__)


def _only(speaks: Any) -> Any:
    """For Accelerate's decorators, which run the function everywhere when there is one process."""

    def decorate(original: Any, self: Any, function: Any = None, index: Any = None, **named: Any) -> Any:
        at = index if index is not None else next(iter(named.values()), None)
        arguments = () if index is None else (index,)
        if function is not None and current_mesh() is not None and not speaks(self, at):
            return _nothing
        return original(self, function, *arguments, **named)

    return decorate


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _init(original: Any, self: Any, cpu: bool = False, **kwargs: Any) -> None:
    cls = type(self)
    if cls._shared_state != {}:
        return original(self, cpu, **kwargs)
    options = current_config()
    _refuse_engines()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        # without this, Accelerate takes each rank for a lone process, or starts only one
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            cpu = False  # which would switch DeepSpeed off
            os.environ["ACCELERATE_USE_CPU"] = "false"
            kwargs["backend"] = kwargs.get("backend") or "gloo"
        elif fsdp2.is_asked_for():
            cpu = False  # which would switch FSDP off
            os.environ.update(ACCELERATE_USE_CPU="false", ACCELERATE_TORCH_DEVICE="cpu")
            kwargs["backend"] = kwargs.get("backend") or "gloo"
        else:
            cpu = True
            os.environ["ACCELERATE_USE_CPU"] = "true"
    original(self, cpu, **kwargs)
    if not torch.distributed.is_initialized():
        cls._shared_state.clear()
        raise TPError(
            f"tp_size={options.tp_size} needs {options.tp_size} processes or a multiple, but this is one process; set "
            f"num_processes: {options.tp_size} and start the script with `accelerate launch` or `torchrun`"
        )
    try:
        mesh = start(options, device_type=self.device.type).mesh
    except TPError:
        cls._shared_state.clear()
        raise
    rng.synchronize(mesh.unit_cpu)  # an unseeded script starts with one state per TP group
    show(self, mesh)
    return None


def show(state: Any, mesh: Mesh) -> None:
    """Rewrite a fresh ``PartialState`` so that it counts TP groups."""
    from accelerate.utils import DistributedType

    state.num_processes = mesh.dp_size
    state.process_index = mesh.data.rank
    if fsdp2.is_asked_for() and state.distributed_type.value in ("NO", "MULTI_CPU"):
        state.distributed_type = DistributedType.MULTI_GPU  # Accelerate makes an FSDP run of one of several GPUs only


def _refuse_engines() -> None:
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise TPError(
            "tp_size together with Megatron-LM is not supported by this version; use distributed_type: MULTI_GPU or "
            "MULTI_CPU (DDP over the data-parallel group), FSDP or DEEPSPEED, or set tp_size: 1"
        )


def _wait_for_everyone(original: Any, self: Any) -> None:
    mesh = current_mesh()
    if mesh is None:
        return original(self)
    if not torch.distributed.is_initialized():
        return None  # after end_training there is nobody to wait for
    require().sync_points.rendezvous(BARRIER)
    require().world_wait()  # another unit may save for longer than the barrier waits
    if mesh.dp_size > 1:
        on_device = self.device.type != "cpu" and torch.distributed.get_backend() != "gloo"
        devices = [self.device.index] if on_device else None
        torch.distributed.barrier(device_ids=devices)
    return None
