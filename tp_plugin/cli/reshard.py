"""``tp-plugin reshard``: a checkpoint rewritten as a run of another tp and dp would have saved it.

DDP's and FSDP2's hold full tensors, or tensors in coordinates of the full model: they are copied.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from tp_plugin.checkpoint import atomic_dir, sources
from tp_plugin.checkpoint.deepspeed_layout import (
    SIDECAR,
    model_file_name,
    optimizer_file_name,
    sharded,
    write_sidecar,
)
from tp_plugin.checkpoint.deepspeed_source import DeepSpeedCheckpoint
from tp_plugin.checkpoint.deepspeed_target import TargetRank, model_file, optimizer_file
from tp_plugin.checkpoint.folders import complete_or_absent
from tp_plugin.checkpoint.safe_paths import copy_inside
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.tied_names import tied_names
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout, load, make_plan, policy_for


def reshard(folder: Path, output: Path, tag: str | None, tp: int, dp: int | None, *, trust: bool = False) -> None:
    """Write ``output`` for ``tp`` × ``dp`` ranks, one file at a time, with everything else that lay in ``folder``.

    The policy and the options of the run that saved it (``expert_parallel`` …) are kept. At tp 1 the result is an
    ordinary DeepSpeed checkpoint. A run under the plugin resumes from any tp and dp without this tool.

    Raises:
        TPError: no checkpoint, an incomplete, damaged or untrusted one, impossible sizes, or ``output`` exists.
    """
    if tp < 1 or (dp is not None and dp < 1):
        raise TPError(f"--tp {tp} --dp {dp}: expected whole numbers of at least 1")
    found = sources.find(folder, tag, trust=trust)
    if found.deepspeed is None:
        with complete_or_absent(output) as out:
            copy_inside(folder, folder, out)
        print(f"{folder} ({found.kind}) resumes at any tp and dp as it is; copied to {output}", file=sys.stderr)
        return
    source = found.deepspeed
    world = source.tp * source.dp
    if dp is None and world % tp:
        raise TPError(f"a world of {world} saved the checkpoint, which --tp {tp} does not divide; name --dp, too")
    dp = dp or world // tp
    layouts = _layouts(source, tp)
    if source.model_state(0)["ds_config"].get("zero_optimization", {}).get("round_robin_gradients") and dp != source.dp:
        raise TPError(
            "zero_optimization.round_robin_gradients orders parameters by the data-parallel size; keep --dp "
            f"{source.dp}, or resume from {folder} directly under the plugin"
        )
    with complete_or_absent(output) as out:
        inside = out if source.folder == folder else out / source.folder.name
        _copy_rest(folder, out, source.folder)
        inside.mkdir(exist_ok=True)
        for t in range(tp):
            for d in range(dp):
                target = TargetRank(tp, dp, t, d, layouts)
                if d == 0 or source.stage == 3:
                    torch.save(model_file(source, target), inside / model_file_name(source.stage, t, d))
                if source.stage:
                    torch.save(optimizer_file(source, target), inside / optimizer_file_name(source.bf16, t, d))
        if tp == 1:
            _put_back_scripts(out)
        write_sidecar(inside, {**source.sidecar, "tp_size": tp, "pp_size": 1, "dp_size": dp, "layouts": layouts})
        if (about := atomic_dir.read_manifest(folder)) is not None:
            atomic_dir.describe(out, {**about, "tp_size": tp, "pp_size": 1, "dp_size": dp})
    message = f"{source.folder} (tp {source.tp}, dp {source.dp}) written to {output} (tp {tp}, dp {dp})"
    print(message, file=sys.stderr)


def _put_back_scripts(out: Path) -> None:
    """DeepSpeed's own recovery scripts: at tp 1 they are right, and need no plugin."""
    import deepspeed.utils

    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        if (out / script).exists():
            shutil.copy2(Path(deepspeed.utils.__file__).with_name(script), out / script)


def _copy_rest(folder: Path, out: Path, tag: Path) -> None:
    """Everything beside the tags: Trainer's state, scheduler, generators, ``latest``."""
    if tag == folder:
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() or not any(path.glob("*model_states.pt")):
            copy_inside(folder, path, out / path.name)


def _layouts(source: DeepSpeedCheckpoint, tp: int) -> dict[str, ParamLayout]:
    """The layouts under ``tp``, from a model of the same config that is never filled."""
    if tp == 1:
        return {}
    if tp == source.tp:
        return source.layouts
    model = _empty_model(source, tp)
    return _planned(model, _saved_config(source, model), tp)


def _saved_config(source: DeepSpeedCheckpoint, model: nn.Module) -> RunConfig:
    """The config of the run that saved the checkpoint.

    Raises:
        TPError: the checkpoint's layouts are not those of its policy and options.
    """
    written = source.sidecar.get("tp_plugin")
    # earlier versions did not write them; of all options this one alone changes layouts
    candidates = [written] if written is not None else [{}, {"expert_parallel": True}]
    wrong = None
    for candidate in candidates:
        config = RunConfig.parse(source.tp, candidate, str(source.folder / SIDECAR))
        if source.tp == 1:
            return config
        wrong = _first_difference(source.layouts, _planned(model, config, source.tp))
        if wrong is None:
            return config
    raise TPError(
        f"{source.folder} was not saved in the layouts that {SIDECAR} leads to ({wrong} differs), but with a policy or "
        "options that it does not name; resume from it directly under the plugin, or reshard to --tp 1"
    )


def _empty_model(source: DeepSpeedCheckpoint, tp: int) -> nn.Module:
    """The model that the checkpoint holds, on the meta device."""
    import transformers

    name, config = source.sidecar.get("model_class"), source.sidecar.get("config")
    if name is None or config is None:
        raise TPError(
            f"{source.folder} does not say which transformers model it holds, so it is not known how --tp {tp} splits "
            "it; reshard to --tp 1, from which a run at any tp_size resumes under the plugin"
        )
    cls = getattr(transformers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise TPError(
            f"{source.folder / SIDECAR} names the model class {name!r}, which this version of transformers does not "
            "have; install the version that saved the checkpoint, or reshard to --tp 1"
        )
    with torch.device("meta"):
        return cls(transformers.AutoConfig.for_model(**config))  # type: ignore[no-any-return]


def _planned(model: nn.Module, config: RunConfig, tp: int) -> dict[str, ParamLayout]:
    policy = load(config.policy) if config.policy else policy_for(model.config)
    parallel, whole = config.expert_parallel, config.leave_whole
    plan = make_plan(model, policy, tp, expert_parallel=parallel, leave_whole=whole)
    return {**plan.layouts, **{alias: plan.layouts[owner] for alias, owner in tied_names(model).items()}}


def _first_difference(saved: dict[str, ParamLayout], planned: dict[str, ParamLayout]) -> str | None:
    """The name of a parameter whose layouts differ."""
    expected = sharded(planned)
    names = sorted({*saved, *expected})
    return next((name for name in names if saved.get(name) != expected.get(name)), None)
