"""HF Trainer: what it does on process 0 it does on one rank; what it sends by torch.distributed goes over the DP group.

Most of it follows from Accelerate's state. These are the places at which Trainer asks torch.distributed itself, or
takes ``process_index == 0`` for "one rank".
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.engines import liger
from tp_plugin.engines.accelerate.operations import DPScopedDist
from tp_plugin.engines.fsdp2 import config as fsdp2
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BARRIER, TRIGGER
from tp_plugin.tensor import rng


class Distributed(DPScopedDist):
    """``torch.distributed`` of dp processes, with barriers at which a TP group meets."""

    @staticmethod
    def get_world_size() -> int:
        mesh = current_mesh()
        return dist.get_world_size() if mesh is None else mesh.dp_size

    @staticmethod
    def get_rank() -> int:
        mesh = current_mesh()
        return dist.get_rank() if mesh is None else mesh.data.rank

    @staticmethod
    def barrier(*args: Any, **kwargs: Any) -> None:
        _meet()
        dist.barrier(*args, **kwargs)


def install_helpers(trainer_pt_utils: Any) -> None:
    """Patch ``transformers.trainer_pt_utils``: scalars and samplers of dp processes."""
    patch(trainer_pt_utils, "dist", Distributed())


def install_utils(trainer_utils: Any) -> None:
    """Patch ``transformers.trainer_utils``: what a killed run left half-written is not the last checkpoint."""
    wrap(trainer_utils, "get_last_checkpoint", _get_last_checkpoint)


def install_arguments(training_args: Any) -> None:
    """Patch ``TrainingArguments``: one rank saves and logs, and one process is not parallel."""
    patch(training_args, "dist", Distributed())
    cls = training_args.TrainingArguments
    patch(cls, "parallel_mode", _parallel_mode(vars(cls)["parallel_mode"], training_args.ParallelMode.NOT_PARALLEL))
    for name in ("should_save", "should_log"):
        patch(cls, name, _on_leader(vars(cls)[name]))
    wrap(cls, "main_process_first", _main_process_first)
    wrap(cls, "__post_init__", _liger_without_loss)


def install(trainer: Any) -> None:
    """Patch ``Trainer``."""
    patch(trainer, "dist", Distributed())
    wrap(trainer, "get_last_checkpoint", _get_last_checkpoint)  # its own name for it, maybe from before the patch
    cls = trainer.Trainer
    wrap(cls, "is_world_process_zero", lambda original, self: original(self) and _leads())
    wrap(cls, "_save_rng_state", lambda original, self, *args: original(self, *args) if _leads() else None)
    wrap(cls, "_load_rng_state", _load_rng_state)
    wrap(cls, "_load_best_model", _load_best_model)
    wrap(cls, "save_model", _save_model)
    wrap(cls, "_save_checkpoint", _save_checkpoint)


def install_jit_checkpoint(trainer_jit_checkpoint: Any) -> None:
    """Patch the checkpoint that ``enable_jit_checkpoint`` makes of a SIGTERM: all ranks make it at the same step."""
    callback = trainer_jit_checkpoint.JITCheckpointCallback
    for name in ("on_pre_optimizer_step", "on_step_begin", "on_step_end", "on_epoch_end"):
        wrap(callback, name, _asked_together)
    wrap(trainer_jit_checkpoint.CheckpointManager, "execute_jit_checkpoint", _execute_jit_checkpoint)


def _asked_together(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh, manager = current_mesh(), self.jit_manager
    if mesh is None or manager is None:
        return original(self, *args, **kwargs)
    # a signal may reach one rank alone, or each at another step; a timer's thread sets the flag at any moment
    met = require().sync_points.rendezvous(TRIGGER, [int(manager.is_checkpoint_requested)])
    asked = torch.tensor(float(any(flag for flag, *_ in met)), device=self.trainer.args.device)
    if not mesh.data.all_reduce(asked, dist.ReduceOp.MAX).item() or getattr(manager, "tp_made", False):
        return None
    manager.is_checkpoint_requested = manager.tp_made = True
    return original(self, *args, **kwargs)


def _execute_jit_checkpoint(original: Any, self: Any) -> None:
    if _leads():
        return original(self)
    self.is_checkpoint_requested = False  # the leader alone marks the folder as incomplete, and takes the mark away
    self.trainer._save_checkpoint(self.trainer.model, trial=None)
    return None


def _liger_without_loss(original: Any, self: Any) -> None:
    original(self)
    if getattr(self, "use_liger_kernel", False):
        given = self.liger_kernel_config or {}
        self.liger_kernel_config = {**(json.loads(given) if isinstance(given, str) else given), **liger.OURS}


def _leads() -> bool:
    mesh = current_mesh()
    return mesh is None or mesh.is_leader


def _meet() -> None:
    mesh = current_mesh()
    if mesh is not None:
        require().sync_points.rendezvous(BARRIER)


def _on_leader(original: property) -> property:
    return property(lambda self: original.fget(self) and _leads(), doc=original.__doc__)  # type: ignore[misc]


def _parallel_mode(original: property, not_parallel: Any) -> property:
    def getter(self: Any) -> Any:
        mode, mesh = original.fget(self), current_mesh()  # type: ignore[misc]
        if mesh is None or mesh.dp_size > 1 or fsdp2.is_asked_for():
            return mode
        # while the device is chosen it is a rank of several; from then on Trainer gathers nothing, and saves and loads
        # the generator of this card only
        several_devices = self.distributed_state.distributed_type.value.startswith("MULTI_")
        return not_parallel if several_devices and "_setup_devices" in vars(self) else mode

    return property(getter, doc=original.__doc__)


@contextlib.contextmanager
def _main_process_first(original: Any, self: Any, local: bool = True, desc: str = "work") -> Iterator[None]:
    state = getattr(self, "distributed_state", None)
    if current_mesh() is None or state is None:
        with original(self, local, desc):
            yield
        return
    with state.local_main_process_first() if local else state.main_process_first():
        yield


def _save_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, *args, **kwargs)
    with require().sessions.together("Trainer.save_model"):  # what it wrote is there when any rank returns
        return original(self, *args, **kwargs)


def _get_last_checkpoint(original: Any, folder: Any) -> str | None:
    """The newest complete one: Trainer writes ``trainer_state.json`` last, and marks what a signal makes it write."""
    newest = original(folder)
    named = [path for path in Path(folder).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    of_trainer = any((path / name).is_file() for path in named for name in ("trainer_state.json", "training_args.bin"))
    if newest is None or not of_trainer:  # a script may call its own checkpoints so, and look for them by this function
        return newest
    for path in sorted(named, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (path / "trainer_state.json").is_file() and not (path / "checkpoint-is-incomplete.txt").exists():
            if path.name != Path(newest).name:
                warnings.warn(
                    f"{newest} is not complete, the run that saved it was ended; {path} is taken", stacklevel=3
                )
            return str(path)
    warnings.warn(f"{newest} is not complete, the run that saved it was ended; there is no other", stacklevel=3)
    return None


def _load_rng_state(original: Any, self: Any, checkpoint: Any) -> None:
    original(self, checkpoint)
    mesh = current_mesh()
    if mesh is not None and checkpoint is not None:
        # the leader's file has the generators of its device, which the others of the group do not hold by that number
        rng.synchronize(mesh.unit_cpu)


def _save_checkpoint(original: Any, self: Any, model: Any, trial: Any = None) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, model, trial)
    if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # which write on all ranks
        # Trainer takes a checkpoint for the best one if its folder is there, which other ranks may be making just then
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        return original(self, model, trial)
    with require().sessions.together("Trainer's checkpoint"):  # a peer must not step on while its shards are read
        saved = original(self, model, trial)
    require().world_wait()  # the next step's all-reduce has a timeout, which a long save outlasts
    return saved


def _load_best_model(original: Any, self: Any) -> Any:
    _meet()  # the leader may still be writing what its peers are about to read
    return original(self)
