"""Checkpoints of a DeepSpeed engine: every rank writes its own shard; a run of any tp and dp reads them.

A run of the same tp, dp and layouts loads with DeepSpeed's own code. In any other run each rank asks DeepSpeed for its
own two files, and they are made from the saved ones (checkpoint/deepspeed_target.py).

A quantized base is left out: its codes are those that the script has loaded, and DeepSpeed knows nothing of its scales.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.checkpoint import deepspeed_target
from tp_plugin.checkpoint.deepspeed_layout import SIDECAR, read_sidecar, sharded, write_sidecar
from tp_plugin.checkpoint.deepspeed_source import DeepSpeedCheckpoint
from tp_plugin.checkpoint.safe_paths import inside
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.patching import wrap
from tp_plugin.engines.tied_names import tied_names
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard import local_states
from tp_plugin.shard.quantized import entries, is_code
from tp_plugin.tensor.param_entry import layout_of

RECOVERY = '''#!/usr/bin/env python3
"""This tensor-parallel checkpoint as one Hugging Face model: {name} CHECKPOINT_DIR OUTPUT_DIR (needs tp-plugin)."""
import sys

from tp_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
'''
"""Stands where DeepSpeed puts scripts that take all ranks for data-parallel ones."""

FRAGMENTS = "frozen_param_fragments"
"""DeepSpeed's key for the parameters that are not trained."""

SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def install_engine(engine: Any) -> None:
    """Patch ``DeepSpeedEngine``."""
    cls = engine.DeepSpeedEngine
    wrap(cls, "save_checkpoint", _save_checkpoint)
    wrap(cls, "_save_checkpoint", _save_model_file)
    wrap(cls, "_copy_recovery_script", _copy_recovery_script)
    wrap(cls, "load_checkpoint", _load_checkpoint)
    wrap(cls, "_zero3_consolidated_16bit_state_dict", _consolidated)
    wrap(cls, "module_state_dict", _without_codes)
    wrap(cls, "_get_zero_frozen_param_attributes", _without_codes)
    wrap(cls, "load_module_state_dict", _load_module)


def _without_codes(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(self, *args, **kwargs)
    codes = entries(self.module) if current_mesh() is not None else ()
    for name in [name for name in found if name.startswith(codes)] if codes else ():
        del found[name]
    return found


def _load_module(original: Any, self: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    """Load what is saved, and what is not (codes) as it is."""
    codes = entries(self.module) if current_mesh() is not None else ()
    if codes:
        with local_states():
            state = self.module.state_dict()
        checkpoint = {**checkpoint, "module": {**checkpoint["module"], **{n: state[n] for n in _weights(state, codes)}}}
        if checkpoint.get(FRAGMENTS) is not None:
            own = {name: p for p, name in self.param_names.items() if name.startswith(codes)}
            fragments = {name: getattr(p, "ds_tensor", p) for name, p in own.items()}
            checkpoint[FRAGMENTS] = {**checkpoint[FRAGMENTS], **fragments}
    return original(self, checkpoint, *args, **kwargs)


def _weights(state: Iterable[str], codes: tuple[str, ...]) -> list[str]:
    return [name for name in state if name in codes and name.endswith(".weight")]


def install_recovery(zero_to_fp32: Any) -> None:
    """Patch ``deepspeed.utils.zero_to_fp32``: its functions give the whole model of a tensor-parallel checkpoint."""
    wrap(zero_to_fp32, "_get_fp32_state_dict_from_zero_checkpoint", _fp32_state_dict)


def _fp32_state_dict(original: Any, folder: Any, exclude_frozen_parameters: bool = False) -> Any:
    if not (Path(folder) / SIDECAR).exists():
        return original(folder, exclude_frozen_parameters)
    source = DeepSpeedCheckpoint(Path(folder))
    frozen = set(source.model_state(0).get("frozen_param_shapes") or {}) if exclude_frozen_parameters else set()
    return OrderedDict((name, tensor) for name, tensor in source.full_masters() if name not in frozen)


def link(engine: Any, config: RunConfig, records: Iterable[Any]) -> None:
    """Let the engine know the run's config, and the records of its models its steps (which tell weights apart)."""
    engine.tp_config = config
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
            "tp_size": mesh.tp_size,
            "pp_size": mesh.pp_size,
            "dp_size": mesh.dp_size,
            "tp_plugin": _run_options(self),
            "layouts": _layouts(self),
            "optimizer_names": _optimizer_names(self),
            "aliases": tied_names(self.module),
            "config": _model_config(self.module),
            "model_class": type(self.module).__name__ if hasattr(self.module, "tp_record") else None,
        }
        write_sidecar(Path(save_dir) / str(tag), sidecar)
    return result


def _run_options(engine: Any) -> Any:
    """The mapping ``tp_plugin:`` of this run, as the user may have written it."""
    config: RunConfig = getattr(engine, "tp_config", RunConfig())
    return config.as_written().options


def _model_config(module: Any) -> dict[str, Any] | None:
    config = getattr(module, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _copy_recovery_script(original: Any, self: Any, save_path: Any) -> None:
    original(self, save_path)
    if current_mesh() is not None:
        for name in SCRIPTS:
            (Path(save_path) / name).write_text(RECOVERY.replace("{name}", name), encoding="utf-8")


def _layouts(engine: Any) -> dict[str, ParamLayout]:
    named = engine.module.named_parameters(remove_duplicate=False)
    return {name: layout for name, p in named if (layout := layout_of(p)) is not None and not is_code(p)}


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
    if folder is None or self.load_universal_checkpoint() or _was_saved_like_this_run(folder, mesh, self):
        return original(self, load_dir, tag, *args, **kwargs)
    if self.zero_nvme_offload_optimizer():
        raise TPError(
            f"{folder} was saved at another tp, dp or layout, and its optimizer states lie on NVMe by rank; resume "
            "with the same tp_size, tp_plugin options and number of processes, or save with offload_optimizer on cpu"
        )
    source = DeepSpeedCheckpoint(folder, _optimizer_names(self))
    stage = self.zero_optimization_stage()
    if source.stage != stage and not (source.stage in (1, 2) and stage in (1, 2)):
        raise TPError(f"{folder} was saved with ZeRO stage {source.stage}, this run uses stage {stage}; use the same")
    shapes = None
    if stage:
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in self._get_zero_param_shapes()]
    sizes = mesh.unit_size, mesh.dp_size, mesh.unit.rank, mesh.data.rank
    target = deepspeed_target.TargetRank(*sizes, _layouts(self), shapes)
    with _Resharding(self, source, target):
        return original(self, load_dir, tag, *args, **kwargs)


def _folder(load_dir: Path, tag: Any) -> Path | None:
    """The folder that DeepSpeed will read; None if there is none, which DeepSpeed itself reports."""
    latest = load_dir / "latest"
    if tag is None and not latest.is_file():
        return None
    folder = load_dir / str(tag) if tag is not None else inside(load_dir, latest.read_text().strip(), latest)
    return folder if folder.is_dir() else None


def _was_saved_like_this_run(folder: Path, mesh: Mesh, engine: Any) -> bool:
    """Whether each rank's files hold what this rank needs, element by element.

    Equal sizes are not enough: with ``expert_parallel`` a rank holds as many elements of the experts, but others.
    """
    saved = read_sidecar(folder)
    if not saved:
        return False  # a plain DeepSpeed checkpoint
    same_sizes = saved["tp_size"] == mesh.tp_size and saved.get("pp_size", 1) == mesh.pp_size
    if engine.zero_optimization():
        same_sizes = same_sizes and saved["dp_size"] == mesh.dp_size
    return same_sizes and saved["layouts"] == sharded(_layouts(engine))


class _Resharding:
    """Inside, the engine reads its files as ``source`` would have written them for ``target``."""

    def __init__(self, engine: Any, source: DeepSpeedCheckpoint, target: deepspeed_target.TargetRank):
        self.engine, self.source, self.target = engine, source, target
        self._made: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._reader = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = self
        # DeepSpeed looks for one existing file per TP rank; which one it is given does not matter to `load`
        model = str(self.source.first_model_file)
        self.engine._get_all_ckpt_names = lambda *args: [model] * self.target.tp

    def __exit__(self, *args: object) -> None:
        self.engine.checkpoint_engine = self._reader
        del self.engine._get_all_ckpt_names

    def load(self, path: Any, map_location: Any = None) -> Any:
        kind = "optimizer" if str(path).endswith("optim_states.pt") else "model"
        if kind not in self._made:
            make = deepspeed_target.optimizer_file if kind == "optimizer" else deepspeed_target.model_file
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
                if is_code(parameter) or (exclude_frozen_parameters and not parameter.requires_grad):
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
    """The whole tensor on the leader of the unit (elsewhere: this rank's own), on the host."""
    local, layout = parameter.detach().cpu().clone(), layout_of(parameter)
    if layout is None or not layout.is_sharded:
        return local
    numel = max(layout.local_numel(rank) for rank in range(mesh.unit_size))  # gather takes equal lengths only
    sent = local.new_zeros(numel)
    sent[: local.numel()] = local.reshape(-1)
    received = [torch.empty_like(sent) for _ in range(mesh.unit_size)] if mesh.is_leader else None
    dist.gather(sent, received, group=mesh.unit_cpu.pg, group_dst=0)
    if received is None:
        return local
    shards = []
    for rank, flat in enumerate(received):
        shards.append(flat[: layout.local_numel(rank)].reshape(layout.local_shape(rank)))
    return layout.gather(shards)
