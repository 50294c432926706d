"""What an Accelerate or DeepSpeed config says of a training, for ``tp-plugin plan --script-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tp_plugin.config.deepspeed import as_mapping
from tp_plugin.errors import TPError


def read(path: Path) -> dict[str, Any]:
    """Fields of a job (and ``gpus``, ``accumulation``) that the file fixes; what it leaves to the script is left out.

    Raises:
        TPError: it cannot be read.
    """
    if not path.is_file():
        raise TPError(f"--script-config {path}: there is no such file")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TPError(f"--script-config {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(written, dict):
        raise TPError(f"--script-config {path}: expected an Accelerate YAML or a DeepSpeed JSON")
    if "zero_optimization" in written or "train_micro_batch_size_per_gpu" in written:
        return _deepspeed(written)
    return _accelerate(written, path)


def _accelerate(written: dict[str, Any], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"gpus": written.get("num_processes")}
    kind = written.get("distributed_type")
    options = written.get("tp_plugin") or {}
    if kind == "DEEPSPEED":
        section = dict(written.get("deepspeed_config") or {})
        file = section.get("deepspeed_config_file")
        if file:
            inner = (
                as_mapping(str(file))
                or as_mapping(str(path.parent / file))
                or as_mapping(str(path.parent / Path(file).name))
            )
            if inner is None:
                raise TPError(f"--script-config {path}: its deepspeed_config_file {file} cannot be read")
            found |= _deepspeed(inner)
        else:
            found["engine"] = f"zero{section.get('zero_stage', 2)}"
            found["accumulation"] = _number(section.get("gradient_accumulation_steps"))
    elif kind == "FSDP":
        section = written.get("fsdp_config") or {}
        found["engine"] = "fsdp2"
        found["checkpointing"] = section.get("fsdp_activation_checkpointing")
    elif kind in ("MULTI_GPU", "MULTI_CPU"):
        found["engine"] = "ddp"
    found["dtype"] = {"bf16": "bf16", "fp16": "fp16"}.get(str(written.get("mixed_precision")))
    found.setdefault("accumulation", _number(written.get("gradient_accumulation_steps")))
    found["tp"] = _number(written.get("tp_size")) or found.get("tp")
    found["pp"] = _number(written.get("pp_size")) or found.get("pp")
    if "sequence_parallel" in options:
        found["sequence_parallel"] = options["sequence_parallel"]
    return {name: value for name, value in found.items() if value is not None}


def _deepspeed(written: dict[str, Any]) -> dict[str, Any]:
    stage = (written.get("zero_optimization") or {}).get("stage", 0)
    found: dict[str, Any] = {
        "engine": f"zero{stage}" if stage else "ddp",
        "micro_batch": _number(written.get("train_micro_batch_size_per_gpu")),
        "accumulation": _number(written.get("gradient_accumulation_steps")),
        "global_batch": _number(written.get("train_batch_size")),
        "tp": _number(written.get("tp_size")),
        "pp": _number(written.get("pp_size")),
    }
    for dtype in ("bf16", "fp16"):
        if (written.get(dtype) or {}).get("enabled") is True:
            found["dtype"] = dtype
    kind = str((written.get("optimizer") or {}).get("type", "")).lower()
    if kind in ("adam", "adamw"):
        found["optimizer"] = "adamw"
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> int | None:
    """A number that the file gives; None for ``auto`` and what is not there."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
