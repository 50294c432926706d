"""The config that runs a layout: Accelerate's YAML, and DeepSpeed's JSON where it is the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tp_plugin.errors import TPError
from tp_plugin.estimate.job import Candidate, Cluster, Job, Layout


def accelerate_yaml(layout: Layout, job: Job, cluster: Cluster, deepspeed_file: str = "") -> dict[str, Any]:
    """The YAML's keys."""
    machines = cluster.gpus // cluster.gpus_per_node
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if cluster.gpus > 1 else "NO",
        "num_machines": machines,
        "machine_rank": 0,
        "num_processes": cluster.gpus,
        "mixed_precision": "no",
    }
    if layout.engine.startswith("zero"):
        found |= {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": deepspeed_file}}
        del found["mixed_precision"]  # the JSON says it
    elif layout.engine == "fsdp2":
        found["distributed_type"] = "FSDP"
        found["mixed_precision"] = "no" if job.dtype == "fp32" else job.dtype
        found["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": layout.checkpointing,
        }
    if not layout.engine.startswith("zero"):
        found["gradient_accumulation_steps"] = layout.accumulation
    if layout.tp > 1:
        found["tp_size"] = layout.tp
    if layout.pp > 1:
        found["pp_size"] = layout.pp
    if layout.sequence_parallel:
        found["tp_plugin"] = {"sequence_parallel": True}
    return found


def deepspeed_json(layout: Layout, job: Job) -> dict[str, Any]:
    """The JSON's keys."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.dp,
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(layout.engine[-1])},
    }
    if job.dtype != "fp32":
        found[job.dtype] = {"enabled": True}
    return found


def config_of(layout: Layout, job: Job, cluster: Cluster, deepspeed_file: str = "ds.json") -> str:
    """All of it as text; in the script remain the micro-batch and gradient checkpointing."""
    script = f"# in the script: a batch of {layout.micro_batch} per process"
    script += f", the model in {job.dtype}" if job.dtype != "fp32" else ""
    script += ", gradient checkpointing" if layout.checkpointing and layout.engine != "fsdp2" else ""
    text = script + "\n" + yaml.safe_dump(accelerate_yaml(layout, job, cluster, deepspeed_file), sort_keys=False)
    if layout.engine.startswith("zero"):
        text += f"# {deepspeed_file}\n{json.dumps(deepspeed_json(layout, job), indent=2)}\n"
    return text


def write_configs(folder: Path, shown: list[Candidate], job: Job, cluster: Cluster) -> None:
    """Write ``layout1.yaml`` (and ``layout1_ds.json``), … for ``accelerate launch``.

    Raises:
        TPError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TPError(f"--write {folder}: it must be a new or an empty folder")
    files: dict[str, str] = {}
    for number, each in enumerate(shown, 1):
        name = f"layout{number}"
        json_file = folder / f"{name}_ds.json"
        head = f"# {each.layout.short}: {each.verdict}\n"
        script = config_of(each.layout, job, cluster).partition("\n")[0] + "\n"
        keys = accelerate_yaml(each.layout, job, cluster, str(json_file))
        files[f"{name}.yaml"] = head + script + yaml.safe_dump(keys, sort_keys=False)
        if each.layout.engine.startswith("zero"):
            files[json_file.name] = json.dumps(deepspeed_json(each.layout, job), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
