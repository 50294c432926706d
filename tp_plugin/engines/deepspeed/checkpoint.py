"""Checkpoints of a DeepSpeed engine: every rank writes its own shard; a run of any tp and dp reads them.

What DeepSpeed saves at (tp, dp) it loads at (tp, dp) itself. At another size each rank asks for its own two files,
which are made from the saved ones (deepspeed_files.py), so DeepSpeed's loading code does all the rest.
"""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.checkpoint import deepspeed_files
from tp_plugin.engines.patching import wrap
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.current import current_mesh, require
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard import local_states
from tp_plugin.tensor.param_entry import layout_of

RECOVERY = '''#!/usr/bin/env python3
"""This tensor-parallel checkpoint as one Hugging Face model: {name} CHECKPOINT_DIR OUTPUT_DIR (needs tp-plugin)."""
import sys

from tp_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
'''
"""Stands where DeepSpeed puts scripts that take all ranks for data-parallel ones."""

SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def install_engine(engine: Any) -> None:
    """Patch ``DeepSpeedEngine``."""
    cls = engine.DeepSpeedEngine
    wrap(cls, "save_checkpoint", _save_checkpoint)
    wrap(cls, "_save_checkpoint", _save_model_file)
    wrap(cls, "_copy_recovery_script", _copy_recovery_script)
    wrap(cls, "load_checkpoint", _load_checkpoint)
    wrap(cls, "_zero3_consolidated_16bit_state_dict", _consolidated)


def install_recovery(zero_to_fp32: Any) -> None:
    """Patch ``deepspeed.utils.zero_to_fp32``: its functions give the whole model of a tensor-parallel checkpoint."""
    wrap(zero_to_fp32, "_get_fp32_state_dict_from_zero_checkpoint", _fp32_state_dict)


def _fp32_state_dict(original: Any, folder: Any, exclude_frozen_parameters: bool = False) -> Any:
    if not (Path(folder) / deepspeed_files.SIDECAR).exists():
        return original(folder, exclude_frozen_parameters)
    source = deepspeed_files.Checkpoint(Path(folder))
    frozen = set(source.model_state(0).get("frozen_param_shapes") or {}) if exclude_frozen_parameters else set()
    return OrderedDict((name, tensor) for name, tensor in source.masters() if name not in frozen)


def link(engine: Any, records: Iterable[Any]) -> None:
    """Let the records of the engine's models know its steps, by which readers tell weights apart."""
    weak = weakref.ref(engine)

    def steps() -> int:
        held = weak()
        return 0 if held is None else int(held.global_steps)

    for record in records:
        record.steps = steps


def _save_checkpoint(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, *args, **kwargs)
    require().sync_points.rendezvous(BARRIER)
    with local_states():
        return original(self, *args, **kwargs)


def _save_model_file(original: Any, self: Any, save_dir: Any, tag: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, save_dir, tag, *args, **kwargs)
    mesh = current_mesh()
    if mesh is not None and mesh.rank == 0:
        sidecar = {
            "format": 1,
            "tp_size": mesh.tp_size,
            "dp_size": mesh.dp_size,
            "layouts": deepspeed_files.layouts_to(_layouts(self)),
            "optimizer_names": _optimizer_names(self),
            "aliases": _aliases(self.module),
            "config": _model_config(self.module),
            "model_class": type(self.module).__name__ if hasattr(self.module, "tp_record") else None,
        }
        (Path(save_dir) / str(tag) / deepspeed_files.SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
    return result


def _model_config(module: Any) -> dict[str, Any] | None:
    config = getattr(module, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _aliases(module: Any) -> dict[str, str]:
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name}


def _copy_recovery_script(original: Any, self: Any, save_path: Any) -> None:
    original(self, save_path)
    if current_mesh() is not None:
        for name in SCRIPTS:
            (Path(save_path) / name).write_text(RECOVERY.replace("{name}", name), encoding="utf-8")


def _layouts(engine: Any) -> dict[str, ParamLayout]:
    named = engine.module.named_parameters(remove_duplicate=False)
    return {name: layout for name, p in named if (layout := layout_of(p)) is not None}


def _optimizer_names(engine: Any) -> list[list[str]] | None:
    """Names of the optimizer's parameters by group, where its state goes by number (no ZeRO)."""
    if engine.zero_optimization() or engine.optimizer is None:
        return None
    groups = getattr(engine.optimizer, "fp16_groups", None)
    groups = groups or [group["params"] for group in engine.optimizer.param_groups]
    return [[engine.param_names[parameter] for parameter in group] for group in groups]


def _load_checkpoint(original: Any, self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, load_dir, tag, *args, **kwargs)
    require().sync_points.rendezvous(BARRIER)
    folder = _folder(Path(load_dir), tag)
    if folder is None or self.load_universal_checkpoint() or _has_this_layout(folder, mesh, self):
        return original(self, load_dir, tag, *args, **kwargs)
    if self.zero_nvme_offload_optimizer():
        raise TPError(
            f"{folder} was saved at another tp or dp, and its optimizer states lie on NVMe by rank; resume at the same "
            "tp_size and number of processes, or save with offload_optimizer on cpu"
        )
    source = deepspeed_files.Checkpoint(folder, _optimizer_names(self))
    stage = self.zero_optimization_stage()
    if source.stage != stage and not (source.stage in (1, 2) and stage in (1, 2)):
        raise TPError(f"{folder} was saved with ZeRO stage {source.stage}, this run uses stage {stage}; use the same")
    shapes = None
    if stage:
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in self._get_zero_param_shapes()]
    target = deepspeed_files.Target(mesh.tp_size, mesh.dp_size, mesh.tp.rank, mesh.data.rank, _layouts(self), shapes)
    with _Resharding(self, source, target):
        return original(self, load_dir, tag, *args, **kwargs)


def _folder(load_dir: Path, tag: Any) -> Path | None:
    latest = load_dir / "latest"
    if tag is None and not latest.is_file():
        return None  # DeepSpeed says so
    folder = load_dir / str(tag if tag is not None else latest.read_text().strip())
    return folder if folder.is_dir() else None


def _has_this_layout(folder: Path, mesh: Mesh, engine: Any) -> bool:
    sidecar = folder / deepspeed_files.SIDECAR
    if sidecar.exists():
        saved = json.loads(sidecar.read_text(encoding="utf-8"))
        return saved["tp_size"] == mesh.tp_size and (saved["dp_size"] == mesh.dp_size or not engine.zero_optimization())
    return False  # a plain DeepSpeed checkpoint


class _Resharding:
    """Inside, the engine reads its files as ``source`` would have written them for ``target``."""

    def __init__(self, engine: Any, source: deepspeed_files.Checkpoint, target: deepspeed_files.Target):
        self.engine, self.source, self.target = engine, source, target
        self._made: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._reader = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = self
        # DeepSpeed looks for one existing file per TP rank; which one it is given does not matter to `load`
        model = str(self.source._model_files[0, 0])
        self.engine._get_all_ckpt_names = lambda *args: [model] * self.target.tp

    def __exit__(self, *args: object) -> None:
        self.engine.checkpoint_engine = self._reader
        del self.engine._get_all_ckpt_names

    def load(self, path: Any, map_location: Any = None) -> Any:
        kind = "optimizer" if str(path).endswith("optim_states.pt") else "model"
        if kind not in self._made:
            make = deepspeed_files.optimizer_file if kind == "optimizer" else deepspeed_files.model_file
            self._made[kind] = make(self.source, self.target)
        return dict(self._made[kind])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _consolidated(original: Any, self: Any, exclude_frozen_parameters: bool = False) -> Any:
    """The whole model on rank 0, one module at a time: partitions over the DP group, then shards over the TP group."""
    import deepspeed

    mesh = current_mesh()
    if mesh is None:
        return original(self, exclude_frozen_parameters)
    require().sync_points.rendezvous(BARRIER)
    if self._optimizer_has_ckpt_event_prologue():
        self.optimizer.checkpoint_event_prologue()
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    seen: dict[int, str] = {}
    for path, module in self.module.named_modules():
        prefix = f"{path}." if path else ""
        parameters = dict(module.named_parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            for name, parameter in parameters.items():
                if exclude_frozen_parameters and not parameter.requires_grad:
                    continue
                if mesh.data.rank > 0:
                    continue
                first = seen.setdefault(id(parameter), prefix + name)
                state[prefix + name] = state[first] if first in state else _whole(parameter, mesh)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[prefix + name] = buffer.detach().cpu()
    if self._optimizer_has_ckpt_event_epilogue():
        self.optimizer.checkpoint_event_epilogue()
    return state if mesh.rank == 0 else None


def _whole(parameter: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The whole tensor on the leader of the TP group (elsewhere: this rank's own), on the host."""
    local, layout = parameter.detach().cpu().clone(), layout_of(parameter)
    if layout is None or not layout.is_sharded:
        return local
    numel = max(layout.local_numel(rank) for rank in range(mesh.tp_size))  # gather takes equal lengths only
    sent = local.new_zeros(numel)
    sent[: local.numel()] = local.reshape(-1)
    received = [torch.empty_like(sent) for _ in range(mesh.tp_size)] if mesh.is_leader else None
    dist.gather(sent, received, group=mesh.unit_cpu.pg, group_dst=0)
    if received is None:
        return local
    shards = []
    for rank, flat in enumerate(received):
        shards.append(flat[: layout.local_numel(rank)].reshape(layout.local_shape(rank)))
    return layout.gather(shards)
