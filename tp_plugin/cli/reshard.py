"""``tp-plugin reshard``: a checkpoint rewritten as a run of another tp and dp would have saved it.

DDP's and FSDP2's hold whole tensors, or tensors in coordinates of the whole model: they are copied.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from tp_plugin.checkpoint import atomic_dir, deepspeed_files, sources
from tp_plugin.checkpoint.folders import complete_or_absent
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout, make_plan, policy_for


def reshard(folder: Path, output: Path, tag: str | None, tp: int, dp: int | None) -> None:
    """Write ``output`` for ``tp`` × ``dp`` ranks, one file at a time, with everything else that lay in ``folder``.

    At tp 1 the result is an ordinary DeepSpeed checkpoint. A run under the plugin resumes from any tp and dp without
    this tool.

    Raises:
        TPError: no checkpoint, an incomplete or damaged one, sizes that do not go, or ``output`` exists.
    """
    if tp < 1 or (dp is not None and dp < 1):
        raise TPError(f"--tp {tp} --dp {dp}: expected whole numbers of at least 1")
    found = sources.find(folder, tag)
    if found.deepspeed is None:
        with complete_or_absent(output) as out:
            shutil.copytree(folder, out, dirs_exist_ok=True)
        print(f"{folder} ({found.kind}) resumes at any tp and dp as it is; copied to {output}", file=sys.stderr)
        return
    source = found.deepspeed
    world = source.tp * source.dp
    if dp is None and world % tp:
        raise TPError(f"a world of {world} saved the checkpoint, which --tp {tp} does not divide; name --dp, too")
    dp = dp or world // tp
    layouts = _layouts(source, tp)
    groups = [source.model_state(0)["ds_config"].get("zero_optimization", {}).get("round_robin_gradients")]
    if any(groups) and dp != source.dp:
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
                target = deepspeed_files.Target(tp, dp, t, d, layouts)
                model, optimizer = deepspeed_files.file_names(source, t, d)
                if d == 0 or source.stage == 3:
                    torch.save(deepspeed_files.model_file(source, target), inside / model)
                if optimizer is not None:
                    torch.save(deepspeed_files.optimizer_file(source, target), inside / optimizer)
        if tp == 1:
            _put_back_scripts(out)
        sidecar = {**source.sidecar, "tp_size": tp, "dp_size": dp, "layouts": deepspeed_files.layouts_to(layouts)}
        (inside / deepspeed_files.SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
        if (about := atomic_dir.read_manifest(folder)) is not None:
            atomic_dir.describe(out, {**about, "tp_size": tp, "dp_size": dp})
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
        if path.is_file():
            shutil.copy2(path, out)
        elif not any(path.glob("*model_states.pt")):
            shutil.copytree(path, out / path.name)


def _layouts(source: deepspeed_files.Checkpoint, tp: int) -> dict[str, ParamLayout]:
    """The layouts under ``tp``, from a model of the same config that is never filled."""
    if tp == 1:
        return {}
    if tp == source.tp:
        return source.layouts
    name, config = source.sidecar.get("model_class"), source.sidecar.get("config")
    if name is None or config is None:
        raise TPError(
            f"{source.folder} does not say which transformers model it holds, so it is not known how --tp {tp} splits "
            "it; reshard to --tp 1, from which a run at any tp_size resumes under the plugin"
        )
    import transformers

    configuration = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, name)(configuration)
    plan = make_plan(model, policy_for(configuration), tp)
    layouts = dict(plan.layouts)
    first = {id(p): n for n, p in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        layouts[alias] = plan.layouts[first[id(parameter)]]
    return layouts
