"""The parts of DeepSpeed that are incompatible with ``tp_size``, and batch sizes that do not add up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeGuard

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.shard import NOT_ELEMENTWISE

logger = logging.getLogger(__name__)

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


def refuse(config: Mapping[str, Any], options: RunConfig) -> None:
    """Refuse what would not train right, while nothing is lost.

    Raises:
        TPError: naming the key, its value and what to do.
    """
    for path, (is_on, reason) in REFUSED.items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and is_on(value):
            raise TPError(f"`{path}: {value}` is incompatible with {options.sizes}: {reason}")
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("stage") == 3:
        options.refuse_stages("ZeRO-3")
    optimizer = config.get("optimizer")
    name = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if name is not None and name.lower() in {known.lower() for known in OPTIMIZERS}:
        raise TPError(
            f"`optimizer.type: {name}` is incompatible with {options.sizes}: it looks at whole tensors, or "
            "communicates over all ranks; use an elementwise one such as AdamW"
        )


def check_batch_sizes(config: Mapping[str, Any], options: RunConfig, dp_size: int, warn: bool = True) -> None:
    """Refuse a ``train_batch_size`` that counts each rank of a unit, and say how a dubious one is read.

    The ranks of a unit are one process to the script, so ``train_batch_size`` has one meaning, that of a run on
    ``dp_size`` processes: ``train_micro_batch_size_per_gpu`` x ``gradient_accumulation_steps`` x ``dp_size``. Where the
    steps are left out, DeepSpeed derives them from it; a script that multiplied by the number of ranks then gets
    ``tp_size`` x ``pp_size`` times as many as it meant. The numbers alone cannot tell, so a warning says which steps
    follow.

    Args:
        config: a DeepSpeed config, without ``"auto"`` values.
        warn: whether this rank logs the warning.

    Raises:
        TPError: all three are numbers, and their arithmetic is that of all ranks.
    """
    total, micro, steps = (
        config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if options.unit_size == 1 or not (_is_count(total) and _is_count(micro)):
        return
    ranks = options.unit_size * dp_size
    if _is_count(steps) and total == micro * steps * ranks:
        raise TPError(
            f"train_batch_size: {total} is train_micro_batch_size_per_gpu: {micro} x gradient_accumulation_steps: "
            f"{steps} x {ranks} ranks, but with {options.sizes} these ranks are {dp_size} data-parallel process(es); "
            f"write train_batch_size: {micro * steps * dp_size} (micro batch x steps x data-parallel size), or leave "
            "it out"
        )
    if warn and steps is None and total % (micro * ranks) == 0:
        derived = total // (micro * dp_size)
        logger.warning(
            f"train_batch_size: {total} with train_micro_batch_size_per_gpu: {micro} means "
            f"gradient_accumulation_steps: {derived}, because with {options.sizes} the {ranks} ranks are {dp_size} "
            f"data-parallel process(es). If the script computed it from the number of ranks, divide by "
            f"{options.unit_size}; write gradient_accumulation_steps to be sure"
        )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0
