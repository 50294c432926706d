"""The arguments of ``tp-plugin plan``, and the job and the cluster that they mean."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from tp_plugin.errors import TPError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of the command."""
    add = parser.add_argument
    add("target", help="model type, config.json or local checkpoint folder")
    add("--gpus", type=int, help="GPUs of the whole run; default 8")
    add("--gpus-per-node", type=int, default=0, help="GPUs of one machine; default 8")
    add("--gpu", help="h100 (default), a100-40, a100-80, h200, b200, l40s, mi300x, rtx4090, or a JSON file")
    add("--sequence", type=int, help="tokens of a sequence; default 2048")
    add("--global-batch", type=int, help="sequences of an optimizer step; default 64")
    add("--micro-batch", type=int, help="sequences of a forward on one replica; default: any")
    add("--lora", metavar="r=16,all-linear", help="rank, and the adapted linears (several names, or all-linear)")
    add("--quantized", help="nf4: frozen weights in 4 bits")
    add("--optimizer", help="adamw (default), adamw_8bit or adafactor")
    add("--engine", help="ddp, zero1, zero2, zero3 or fsdp2; default: any")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing; default: either")
    add("--sequence-parallel", action=argparse.BooleanOptionalAction, help="default: either")
    add("--dtype", help="what the model is loaded in: bf16 (default), fp16 or fp32")
    add("--attention", help="sdpa (default) or eager")
    add("--compile", action="store_true", help="the model is compiled")
    add("--tp", type=int, help="ranks that split a tensor; default: any legal one in a machine")
    add("--pp", type=int, help="pipeline stages; default: any")
    add("--tokens", type=float, default=0.0, help="of the whole training, for its hours: 1e9")
    add("--script-config", type=Path, metavar="FILE", help="accelerate.yaml or ds.json: what it says counts as given")
    add("--top", type=int, default=3, help="layouts to show; default 3")
    add("--json", action="store_true", help="print data instead of tables")
    add("--write", type=Path, metavar="DIR", help="write the configs of the layouts shown, ready to launch")
    add("--plot", type=Path, metavar="FILE.png", help="draw memory and time of the layouts shown")
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure the constants of times on this machine, a minute, into a file; nothing is planned",
    )
    add("--calibration", type=Path, metavar="FILE", help="constants that --calibrate measured: the plan shows seconds")


def job_and_cluster(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """What the arguments and the script's config say; the arguments count first.

    Raises:
        TPError: a value is none, or the config cannot be read.
    """
    from tp_plugin.cli.plan_script_config import read
    from tp_plugin.estimate.job import Cluster, Job

    found = read(arguments.script_config) if arguments.script_config else {}
    given: dict[str, Any] = {
        "sequence": arguments.sequence,
        "global_batch": arguments.global_batch,
        "micro_batch": arguments.micro_batch,
        "quantized": arguments.quantized,
        "optimizer": arguments.optimizer,
        "engine": arguments.engine,
        "checkpointing": arguments.checkpointing,
        "sequence_parallel": arguments.sequence_parallel,
        "dtype": arguments.dtype,
        "attention": arguments.attention,
        "compiled": arguments.compile or None,
        "tp": arguments.tp,
        "pp": arguments.pp,
        "tokens": arguments.tokens or None,
        **(_lora(arguments.lora) if arguments.lora else {}),
    }
    merged = {**found, **{name: value for name, value in given.items() if value is not None}}
    gpus = arguments.gpus or merged.pop("gpus", None) or 8
    merged.pop("gpus", None)
    replicas = gpus // (merged.get("tp") or 1) // (merged.get("pp") or 1)
    accumulation = merged.pop("accumulation", None)
    if accumulation and merged.get("micro_batch") and "global_batch" not in merged:
        merged["global_batch"] = accumulation * merged["micro_batch"] * max(replicas, 1)
    known = {field.name for field in fields(Job)}
    job = Job(**{name: value for name, value in merged.items() if name in known})
    return job, Cluster(gpus, arguments.gpus_per_node, arguments.gpu or "h100")


def _lora(text: str) -> dict[str, Any]:
    rank, targets = 0, []
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key == "r" and value.isdecimal() and int(value) > 0:
            rank = int(value)
        elif key and not value:
            targets.append(key)
        else:
            raise TPError(f"--lora {text}: expected a rank and the adapted linears, for example r=16,all-linear")
    if not rank:
        raise TPError(f"--lora {text}: it names no rank; write for example --lora r=16,{text}")
    names: Any = tuple(targets) if targets and targets != ["all-linear"] else "all-linear"
    return {"lora_rank": rank, "lora_targets": names}
