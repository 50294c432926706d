"""``Accelerator``: sharding when a model is prepared, DDP over the DP group, triggers and checkpoints."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from tp_plugin.config.resolve import current_config
from tp_plugin.engines import launch_report, saving
from tp_plugin.engines.accelerate import save_state
from tp_plugin.engines.accelerate.operations import TorchWithScopedDist
from tp_plugin.engines.fsdp2 import prepare as fsdp2
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.quantization import refuse_fsdp2
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import current, current_mesh, require
from tp_plugin.runtime.sync_points import TRIGGER
from tp_plugin.shard import agree_on_weights, materialize_all_, models_in, parallelize, shard_optimizer


def install(accelerator: Any) -> None:
    """Patch ``accelerate.accelerator``."""
    cls = accelerator.Accelerator
    wrap(cls, "__init__", _init)
    wrap(cls, "prepare", _prepare)
    wrap(cls, "prepare_model", _prepare_model)
    wrap(cls, "prepare_optimizer", _prepare_optimizer)
    wrap(cls, "join_uneven_inputs", _join_uneven_inputs)
    wrap(cls, "save_model", saving.save_model)
    wrap(cls, "get_state_dict", saving.get_state_dict)
    wrap(cls, "check_trigger", _check_trigger)
    save_state.install(accelerator)
    for name in ("prepare", "prepare_model", "prepare_optimizer", "save_state", "load_state", "get_state_dict"):
        wrap(cls, name, in_step)  # the engine's own code
    fsdp2.install(accelerator)
    patch(cls, "is_last_process", property(lambda self: self.state.is_last_process))


def install_local_sgd(local_sgd: Any) -> None:
    """Patch ``accelerate.local_sgd``: one process averages with nobody, and its model has no ``no_sync``."""
    wrap(local_sgd.LocalSGD, "__init__", _local_sgd)


def _local_sgd(
    original: Any, self: Any, accelerator: Any, model: Any, local_sgd_steps: int, enabled: bool = True
) -> None:
    mesh = current_mesh()
    original(self, accelerator, model, local_sgd_steps, enabled and (mesh is None or mesh.dp_size > 1))


def install_checkpointing(checkpointing: Any) -> None:
    """Patch ``accelerate.checkpointing``: the leader writes a process's files; a bad one is named."""
    patch(checkpointing, "torch", _TorchSavedByLeader())
    wrap(checkpointing, "load", _load)


def _load(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(file, *args, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise TPError(
            f"{file} cannot be read ({type(error).__name__}: {error}); it is cut short or no such file at all: load "
            "another checkpoint"
        ) from error


class _TorchSavedByLeader(TorchWithScopedDist):
    @staticmethod
    def save(*args: Any, **kwargs: Any) -> None:
        mesh = current_mesh()
        if mesh is None or mesh.is_leader:
            torch.save(*args, **kwargs)


def _init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    config = getattr(self, "parallelism_config", None)
    if current_mesh() is not None and config is not None and getattr(config, "total_size", 1) > 1:
        raise TPError(
            "both `tp_size` and Accelerate's own ParallelismConfig are set; keep the top-level `tp_size` and remove "
            "`parallelism_config`"
        )


def _prepare(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    # models first: an optimizer given before its model in the argument list is built on the same parameters
    modules = [item for item in args if isinstance(item, nn.Module)]
    for item in sorted(modules, key=_is_beside):
        _shard(self, item)
    for item in args:
        if isinstance(item, torch.optim.Optimizer):
            _shard_optimizer(item)
            if current() is not None and self.is_fsdp2:
                fsdp2.refuse_optimizer(_bare(item))
    prepared = original(self, *args, **kwargs)
    _announce(self)
    return prepared


def _announce(accelerator: Any) -> None:
    runtime = current()
    if runtime is not None and accelerator.distributed_type.value != "DEEPSPEED":  # which announces itself
        replicas = "FSDP2" if accelerator.is_fsdp2 else "DDP" if runtime.mesh.dp_size > 1 else "one replica"
        launch_report.announce(runtime, replicas)


def _prepare_model(
    original: Any, self: Any, model: Any, device_placement: Any = None, evaluation_mode: bool = False
) -> Any:
    _shard(self, model)
    mesh = current_mesh()
    if mesh is not None and mesh.dp_size > 1:
        self.ddp_handler = over_grad_group(self.ddp_handler, mesh)
    elif mesh is not None and self.distributed_type.value == "MULTI_CPU":
        evaluation_mode = True  # which is without DDP: on GPUs Accelerate itself leaves out one over a single process
    return original(self, model, device_placement, evaluation_mode)


def _join_uneven_inputs(original: Any, self: Any, joinables: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is not None and mesh.dp_size == 1:
        return contextlib.nullcontext(joinables)  # one process joins nobody, and is not warned
    return original(self, joinables, *args, **kwargs)


def _prepare_optimizer(original: Any, self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    _shard_optimizer(optimizer)
    return original(self, optimizer, *args, **kwargs)


def _shard(accelerator: Any, model: nn.Module) -> None:
    runtime = current()
    if runtime is None:
        return
    if getattr(model, "_is_accelerate_prepared", False):
        return
    if accelerator.distributed_type.value == "DEEPSPEED":
        import deepspeed

        assert getattr(deepspeed.initialize, "tp_patched", False), "ZeRO would reduce gradients over the whole world"
    options = current_config()
    if options.tp_size > 1 and accelerator.distributed_type.value == "FSDP":
        refuse_fsdp2(model)
    loaded_once = fsdp2.is_loaded_once(accelerator)
    if type(model).__name__ in options.leave_whole or (_is_beside(model) and runtime.held_bytes):
        agree_on_weights(model, runtime.mesh, whole_world=loaded_once)
        materialize_all_(model)
        return
    parallelize(model, options.tp_size, options=options, loaded_once=loaded_once)
    for optimizer in accelerator._optimizers:  # prepared before its model
        _shard_optimizer(optimizer)


def _shard_optimizer(optimizer: Any) -> None:
    runtime = current()
    if runtime is not None:
        shard_optimizer(_bare(optimizer), runtime)


def _is_beside(module: nn.Module) -> bool:
    """Whether there is no model in ``module``: a projection or a head that the script prepares beside its model."""
    return next(models_in(module), None) is None


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def over_grad_group(handler: Any, mesh: Mesh) -> Any:
    """The script's DDP settings (or the defaults) with the group that averages gradients as process group."""
    from accelerate import DistributedDataParallelKwargs

    class DPProcessGroupHandler(DistributedDataParallelKwargs):
        def to_kwargs(self) -> dict[str, Any]:
            plain = handler.to_kwargs() if handler is not None else {}
            return {**plain, "process_group": mesh.grad.pg}

        def register_comm_hook(self, model: nn.Module) -> None:
            if handler is not None:
                handler.register_comm_hook(model)

    return handler if type(handler).__name__ == "DPProcessGroupHandler" else DPProcessGroupHandler()


def _check_trigger(original: Any, self: Any) -> bool:
    mesh = current_mesh()
    if mesh is not None:
        # a trigger set on one rank of a TP group is set for that process
        mine = 0 if self.flag_tensor is None else int(self.flag_tensor.item())
        if any(flag for flag, *_ in require().sync_points.rendezvous(TRIGGER, [mine])):
            self.flag_tensor = torch.tensor(1, device=self.device)
    return bool(original(self))
