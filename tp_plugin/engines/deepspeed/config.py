"""Our keys in a DeepSpeed config, and the parts of DeepSpeed that do not go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tp_plugin.config.run_config import Options, from_deepspeed
from tp_plugin.errors import TPError
from tp_plugin.shard import NOT_ELEMENTWISE

REFUSED = {
    "tensor_parallel.autotp_size": (
        lambda value: value > 1,
        "it is DeepSpeed's own tensor parallelism, which would shard the model a second time; keep `tp_size` alone",
    ),
    "zero_optimization.zero_hpz_partition_size": (
        lambda value: value > 1,
        "hpZ builds its secondary groups from neighbouring ranks of the world, which are TP groups here; remove it",
    ),
    "zero_optimization.mics_shard_size": (
        lambda value: value > 0,
        "MiCS builds its shard groups from neighbouring ranks of the world, which are TP groups here; remove it",
    ),
    "zero_optimization.zero_quantized_gradients": (
        bool,
        "qgZ exchanges gradients over all ranks of a node, which would mix shards of different weights; remove it",
    ),
    "zero_optimization.zenflow": (bool, "ZenFlow selects columns of whole weights, which no rank holds; remove it"),
    "sequence_parallel_size": (
        lambda value: value > 1,
        "Ulysses' sequence parallelism brings an mpu of its own; remove it, or set tp_size: 1",
    ),
    "expert_parallel.enabled": (bool, "AutoEP does not work with an mpu; remove it, or set tp_size: 1"),
    "hybrid_engine.enabled": (bool, "the hybrid engine shards the model itself for inference; remove it"),
    "compression_training": (bool, "compression prunes and quantizes whole weights, which no rank holds; remove it"),
    "checkpoint.load_universal": (
        bool,
        "universal checkpoints know nothing of the shards; remove it: any checkpoint, saved at whatever tp and dp, is "
        "resharded while it is loaded",
    ),
    "elasticity.enabled": (bool, "elastic training changes the world under the TP groups; remove it"),
    "pipeline.stages": (lambda value: value not in (None, 1, "auto"), "pipeline stages need a PipelineModule"),
}
"""Key → (when it is switched on, why it does not work and what to do)."""

OPTIMIZERS = (*NOT_ELEMENTWISE, "OnebitAdam", "ZeroOneAdam", "OnebitLamb")
"""Optimizers that need whole tensors, or communicate over the world."""


def options_of(config: Mapping[str, Any], origin: str) -> Options:
    """The options of this run, from a DeepSpeed config and the environment, which must agree.

    Raises:
        TPError: the keys hold something else than they may, or two places ask for different things.
    """
    configured, written = Options.from_environment(), from_deepspeed(config, origin)
    if written is None or configured == written:
        return configured
    if configured == Options():
        return written
    if configured.tp_size != written.tp_size:
        raise TPError(
            f"tp_size is {written.tp_size} in {origin}, but {configured.tp_size} in the environment or the launcher's "
            "config; write it in one place"
        )
    return configured


def without_our_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as DeepSpeed may see it."""
    return {key: value for key, value in config.items() if key not in ("tp_size", "tp_plugin")}


def refuse(config: Mapping[str, Any], tp_size: int) -> None:
    """Refuse what would not train right, while nothing is lost.

    Raises:
        TPError: naming the key, its value and what to do.
    """
    for path, (is_on, reason) in REFUSED.items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and is_on(value):
            raise TPError(f"`{path}: {value}` does not go with tp_size={tp_size}: {reason}")
    optimizer = config.get("optimizer")
    name = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if name is not None and name.lower() in {known.lower() for known in OPTIMIZERS}:
        raise TPError(
            f"`optimizer.type: {name}` does not go with tp_size={tp_size}: it looks at whole tensors, or communicates "
            "over all ranks; use an elementwise one such as AdamW"
        )
