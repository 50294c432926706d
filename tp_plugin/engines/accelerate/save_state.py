"""``save_state`` and ``load_state``: a checkpoint is there complete or not at all, and says what saved it.

ZeRO and FSDP2 write from all ranks in parallel. Under DDP every replica is whole, so the main process writes model and
optimizer, tensor by tensor from its TP group, and each process its generators. That form knows nothing of tp or dp.
A script may call ``save_state`` on its main process alone there, as it may without us.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tp_plugin.checkpoint import atomic_dir, safe_pickle
from tp_plugin.engines.patching import wrap
from tp_plugin.engines.tied_names import tied_names
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard import lazy_full_tensors, local_states, models_in
from tp_plugin.shard.params import plain_name
from tp_plugin.tensor import rng

SESSION = "Accelerator.save_state"
ENGINES = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed ZeRO"}
"""Accelerate's distributed types whose ranks save together; all others are DDP to us."""


def install(accelerator: Any) -> None:
    """Patch ``accelerate.accelerator``."""
    wrap(accelerator.Accelerator, "save_state", _save_state)
    wrap(accelerator.Accelerator, "load_state", _load_state)
    wrap(accelerator, "load_accelerator_state", _load_accelerator_state)


def _save_state(original: Any, self: Any, output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, output_dir, *args, **kwargs)
    naming = self.project_configuration
    automatic = naming.automatic_checkpoint_naming
    folder = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}" if automatic else output_dir
    folder = Path(os.path.expanduser(folder))
    if automatic and atomic_dir.is_complete(folder) and folder.exists():
        raise ValueError(
            f"Checkpoint directory {folder} ({self.save_iteration}) already exists. Please manually override "
            "`self.save_iteration` with what iteration to start with."
        )
    naming.automatic_checkpoint_naming = False  # its limit would delete the last complete one before there is another
    try:
        _write(lambda aside: original(self, str(aside), *args, **kwargs), self, folder, mesh)
    finally:
        naming.automatic_checkpoint_naming = automatic
    if automatic and naming.total_limit is not None and self.is_main_process:
        for old in _numbered(folder.parent)[: -naming.total_limit or None]:
            shutil.rmtree(old)
    return folder


def _write(write: Any, accelerator: Any, folder: Path, mesh: Mesh) -> None:
    """``write(aside)`` on this rank, and what makes a complete checkpoint of what all ranks wrote."""
    sessions = require().sessions
    collective = accelerator.distributed_type.value in ENGINES
    sessions.enter(SESSION)
    joint = collective or not mesh.is_leader or sessions.is_joined(SESSION)
    local_main = accelerator.is_local_main_process or not joint
    try:
        if local_main:
            atomic_dir.begin(folder)
        if joint:
            accelerator.wait_for_everyone()
        problem = None
        with sessions.together(SESSION) if joint and not collective else contextlib.nullcontext():
            try:
                with contextlib.nullcontext() if collective else _once(accelerator):
                    write(folder / atomic_dir.ASIDE)
            except Exception as error:
                if collective:
                    raise  # the others are in collectives of the engine: the launcher ends them
                problem = error
    finally:
        sessions.close(SESSION)
    if joint:
        _meet(accelerator)
    problems = mesh.world.gather_objects(problem and str(problem)) if joint and not collective else [problem]
    if any(problems):
        if local_main:
            atomic_dir.abandon(folder)
        rank = next(rank for rank, found in enumerate(problems) if found)
        raise problem or TPError(f"save_state failed on rank {rank}: {problems[rank]}")
    if accelerator.is_main_process or not joint:
        atomic_dir.finish(folder, _about(accelerator, mesh))
    if joint:
        accelerator.wait_for_everyone()
        if local_main and (folder / atomic_dir.ASIDE).exists():  # machines that share no folder
            atomic_dir.finish(folder, _about(accelerator, mesh))


def _meet(accelerator: Any) -> None:
    """As long as one writes, the others are in no collective that ends by a timeout."""
    require().sync_points.rendezvous(BARRIER)
    require().world_wait()
    accelerator.wait_for_everyone()


@contextlib.contextmanager
def _once(accelerator: Any) -> Iterator[None]:
    """Full tensors are read by the rank that writes them, when it writes them."""
    each_node = accelerator.project_configuration.save_on_each_node
    writes = accelerator.is_local_main_process if each_node else accelerator.is_main_process
    with lazy_full_tensors() if writes else local_states():
        yield


def _about(accelerator: Any, mesh: Mesh) -> dict[str, Any]:
    models = []
    for wrapped in accelerator._models:
        model = accelerator.unwrap_model(wrapped)
        root = next((root for _, root in models_in(model)), model)
        config = getattr(root, "config", None)
        models.append(
            {
                "class": type(root).__name__,
                "inside": type(model).__name__ if root is not model else None,
                "config": config.to_dict() if hasattr(config, "to_dict") else None,
                "aliases": {plain_name(name): plain_name(owner) for name, owner in tied_names(root).items()},
            }
        )
    return {
        "engine": _engine(accelerator),
        "tp_size": mesh.tp_size,
        "dp_size": mesh.dp_size,
        "models": models,
    }


def _engine(accelerator: Any) -> str:
    return ENGINES.get(accelerator.distributed_type.value, "DDP")


def _numbered(parent: Path) -> list[Path]:
    """Checkpoint folders by their numbers."""
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := re.search(r"(\d+)[^/]*$", path.name))]
    return [path for _, path in sorted(found)]


def _load_state(original: Any, self: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, input_dir, *args, **kwargs)
    folder = _find(self, input_dir)
    self.wait_for_everyone()
    if folder is None:
        return original(self, input_dir, *args, **kwargs)  # Accelerate says what is wrong
    _check(self, folder, mesh)
    result = original(self, str(folder), *args, **kwargs)
    _take_step(self, folder)
    # the leader's file has the generators of its device, which the others of the group do not hold by the same number
    rng.synchronize(mesh.unit_cpu)
    return result


def _find(accelerator: Any, input_dir: Any) -> Path | None:
    if input_dir is not None:
        folder = Path(os.path.expanduser(input_dir))
        return folder if folder.is_dir() else None
    parent = Path(accelerator.project_dir or ".") / "checkpoints"
    if not accelerator.project_configuration.automatic_checkpoint_naming or not parent.is_dir():
        return None
    folders = _numbered(parent)
    for folder in reversed(folders):
        if atomic_dir.is_complete(folder):
            if folder != folders[-1]:
                warnings.warn(f"{folders[-1]} is not complete; {folder} is loaded", stacklevel=4)
            return folder
    return folders[-1] if folders else None


def _check(accelerator: Any, folder: Path, mesh: Mesh) -> None:
    """Finish what was about to be, and look at the files; on every rank the same, before any weight is loaded."""
    problem = None
    try:
        if accelerator.is_local_main_process:
            atomic_dir.recover(folder)
    except (OSError, TPError) as error:
        problem = str(error)
    accelerator.wait_for_everyone()
    if problem is None:
        try:
            saved = atomic_dir.check(folder).get("engine")
            if saved is not None and saved != _engine(accelerator):
                problem = (
                    f"checkpoint {folder} was saved by {saved}, this run uses {_engine(accelerator)}; load it with the "
                    f"same distributed_type, or take its weights: `tp-plugin export {folder} OUTPUT`"
                )
        except TPError as error:
            problem = str(error)
    problems = mesh.world.gather_objects(problem)
    found = next((text for text in problems if text), None)
    if found is not None:
        raise TPError(found)


def _take_step(accelerator: Any, folder: Path) -> None:
    """A process that was not there when the state was saved is at the same step of gradient accumulation."""
    if (folder / f"random_states_{accelerator.process_index}.pkl").exists():
        return
    first = folder / "random_states_0.pkl"
    if first.exists():
        accelerator.step = safe_pickle.load(first).get("step", accelerator.step)
        warnings.warn(
            f"{folder} has no generators of process {accelerator.process_index}; its random numbers start anew",
            stacklevel=4,
        )


def _load_accelerator_state(original: Any, input_dir: Any, models: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    if current_mesh() is not None:
        models = [_as_saved(model, Path(input_dir), number) for number, model in enumerate(models)]
    return original(input_dir, models, *args, **kwargs)


def _as_saved(model: nn.Module, folder: Path, number: int) -> nn.Module:
    """``model``, inside a DDP-like wrapper or not, as its weights were saved: DDP's names begin with ``module.``."""
    file = folder / f"model{f'_{number}' if number else ''}.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    else:
        file = folder / f"pytorch_model{f'_{number}' if number else ''}.bin"
        names = list(torch.load(file, map_location="cpu", mmap=True, weights_only=True)) if file.exists() else []
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    if not names or wrapped == all(name.startswith("module.") for name in names):
        return model
    return model.module if wrapped else _Inside(model)


class _Inside(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
