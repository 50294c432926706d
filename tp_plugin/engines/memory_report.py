"""``report_memory: true``: what the plan says that each rank holds, beside what it held in the third step; said once.

Parameters, gradients and optimizer states are counted from the tensors that are there, on every device; the peak from
the device's own statistics, which count at the host and wait for nothing. Ranks tell each other in the key-value store.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.estimate.live_run import (
    OPTIMIZERS,
    Batch,
    engine_of,
    held_by,
    layout_of_run,
    numbers_kept,
    planner_of_run,
)
from tp_plugin.estimate.states import BUCKET, states
from tp_plugin.mesh.dtensor_utils import held
from tp_plugin.runtime.first_step import size
from tp_plugin.runtime.runtime import Runtime, slot
from tp_plugin.shard.model_state import ModelState

STEP = 3
"""The step that is looked at: states are there, and what a first step needs once is gone."""

PATIENCE = timedelta(seconds=60)
"""For what other ranks say."""

PARTS = ("weights", "gradients", "optimizer states")


def _never_fatal(method: Callable[..., None]) -> Callable[..., None]:
    """A report does not end the run that it is about: what it cannot count, it says."""

    @functools.wraps(method)
    def run(self: MemoryReport, *args: Any) -> None:
        try:
            method(self, *args)
        except Exception as error:
            self.give_up(error)

    return run


class MemoryReport:
    """Is told of training forwards and optimizer steps until it has spoken.

    Attributes:
        batch: what the last training forward got.
        micro_batches: training forwards since the last step.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self.batch, self.micro_batches = Batch(), 0
        self._steps = 0
        self._open: Any = None
        self._optimizers: dict[int, Any] = {}
        self._found: dict[str, list[float]] = {}

    @_never_fatal
    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training forward begins."""
        if not self.micro_batches or self._steps == STEP - 1:
            self.batch = Batch.of(module, args, kwargs)
        self.micro_batches += 1

    @_never_fatal
    def before_step(self, stepper: Any) -> None:
        """An optimizer, or DeepSpeed's engine, is about to step: gradients are there."""
        inner = self._open is not None and self._open is not stepper  # the optimizer that an engine steps
        if inner:
            return
        self._optimizers[id(stepper)] = stepper
        self._open = stepper
        if self.micro_batches and self._steps == STEP - 1:
            with self._runtime.region.step():
                self._found = self._parts()

    @_never_fatal
    def after_step(self, stepper: Any) -> None:
        """It has stepped."""
        if self._open is not stepper:
            return
        self._open = None
        if not self.micro_batches:  # a second optimizer of the same step
            return
        self._steps += 1
        on_device = self._runtime.mesh.devices.device_type != "cpu"
        if self._steps == STEP - 1 and on_device:
            torch.accelerator.reset_peak_memory_stats()
        if self._steps == STEP:
            self._runtime.progress.memory_report = None
            if on_device:
                self._found["peak"] = [torch.accelerator.max_memory_allocated()]
            self._tell()
        self.micro_batches = 0

    def give_up(self, error: Exception) -> None:
        """Say why there is no report, also to the rank that would wait for this one."""
        rank = self._runtime.mesh.rank
        self._runtime.progress.memory_report = None
        why = f"{type(error).__name__}: {error}"
        print(
            f"tp_plugin: report_memory: rank {rank} could not count what it holds ({why})", file=sys.stderr, flush=True
        )
        if rank and trained_models(self._runtime):
            dist.distributed_c10d._get_default_store().set(f"{self._key()}/{rank}", json.dumps(None))

    def _key(self) -> str:
        return f"tp_plugin/memory/{trained_models(self._runtime)[0].number}"

    def _parts(self) -> dict[str, list[float]]:
        """Predicted and measured bytes of this rank."""
        zero = next((each for each in self._optimizers.values() if hasattr(each, "zero_optimization_stage")), None)
        models = trained_models(self._runtime)
        engine = engine_of(models[0], 0 if zero is None else zero.zero_optimization_stage())
        mine = [parameter for state in models for parameter in held_by(state)]
        kind = _kind(zero.optimizer if zero is not None else next(iter(self._optimizers.values())))
        bucket = int(getattr(getattr(zero, "optimizer", None), "reduce_bucket_size", BUCKET))
        said = states(mine, engine, self._runtime.mesh.dp_size, kind or "adamw", False, bucket)
        tensors = [tensor for state in models for tensor in state.index.tensors().values()]
        return {
            "weights": [said.weights, _bytes(getattr(p, "ds_tensor", p) for p in tensors)],
            "gradients": [said.gradients, _gradients(tensors, getattr(zero, "optimizer", None))],
            "optimizer states": [
                said.optimizer if kind else -1, _states(self._optimizers.values(), tensors, zero)
            ],
        }  # fmt: skip

    def _tell(self) -> None:
        mesh, store = self._runtime.mesh, dist.distributed_c10d._get_default_store()
        models = trained_models(self._runtime)
        key = self._key()
        if mesh.rank:
            store.set(f"{key}/{mesh.rank}", json.dumps(self._found))
            return
        zero = next((each for each in self._optimizers.values() if hasattr(each, "zero_optimization_stage")), None)
        engine = engine_of(models[0], 0 if zero is None else zero.zero_optimization_stage())
        traced = activations(self._runtime, models[0], engine, self.batch, self.micro_batches)
        found: list[Any] = [self._found]
        for rank in range(1, mesh.world.size):
            try:
                store.wait([f"{key}/{rank}"], PATIENCE)
                found.append(json.loads(store.get(f"{key}/{rank}")))
            except RuntimeError:  # it takes another way through the script
                found.append(None)
        print("\n".join(lines(found, traced, mesh.tp_size, mesh.unit.size)), file=sys.stderr, flush=True)


def trained_models(runtime: Runtime) -> list[ModelState]:
    """Of the run's models those that are still there, in their order."""
    return sorted((s for s in runtime.models if s.alive()), key=lambda s: s.number)


def _kind(optimizer: Any) -> str:
    for _ in range(3):  # what DeepSpeed and Accelerate wrap
        if type(optimizer).__name__ in OPTIMIZERS:
            break
        optimizer = getattr(optimizer, "optimizer", optimizer)
    return OPTIMIZERS.get(type(optimizer).__name__, "")


def _bytes(tensors: Iterable[Any]) -> float:
    """Of their storages, each once."""
    storages = [held(tensor).untyped_storage() for tensor in tensors]
    return float(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))


def _gradients(tensors: list[torch.Tensor], engine: Any) -> float:
    """ZeRO keeps them in places of its own, some as parts of larger tensors."""
    parts = getattr(engine, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None)
    if parts is not None:
        return _bytes(parts.values())
    if getattr(engine, "averaged_gradients", None):
        groups = (group for group in engine.averaged_gradients.values() if group)
        return float(sum(grad.nbytes for group in groups for grad in group if grad is not None))
    if hasattr(engine, "fp32_groups_gradients"):
        return _bytes(grad for group in engine.fp32_groups_gradients for grad in group)
    return _bytes(p.grad for p in tensors if p.grad is not None)


def _states(optimizers: Iterable[Any], tensors: list[torch.Tensor], zero: Any) -> float:
    if zero is not None:
        engine = zero.optimizer
        copies = getattr(engine, "fp32_partitioned_groups_flat", None)
        copies = copies or getattr(engine, "single_partition_of_fp32_groups", None)
        copies = copies or getattr(engine, "fp32_groups_flat_partition", None) or []
        inner = getattr(engine, "optimizer", engine)
        return _bytes([*copies, *_in_states(inner.state.values())])
    mine = set(map(id, tensors))
    chosen = [state for each in optimizers for parameter, state in each.state.items() if id(parameter) in mine]
    return _bytes(_in_states(chosen))


def _in_states(found: Iterable[Any]) -> Iterator[torch.Tensor]:
    return (t for state in found for t in state.values() if isinstance(t, torch.Tensor) and t.dim())


class Traced:
    """What the plan says of activations and of the peak, for each stage; or why it says nothing."""

    def __init__(self) -> None:
        self.stages: list[tuple[float, float]] = []
        self.why = ""


def activations(runtime: Runtime, state: ModelState, engine: str, batch: Batch, micro_batches: int) -> Traced:
    """Traced on the meta device by this rank alone, which therefore is no part of the run meanwhile."""
    found, model = Traced(), state.model()
    checkpointing = is_checkpointed(model)
    layout = layout_of_run(runtime.config, runtime.mesh, engine, batch, micro_batches, checkpointing)
    try:
        with alone(), numbers_kept():
            planner = planner_of_run(model, state, runtime.config, layout, batch, "adamw", 0.0)
            found.stages = [
                (memory.parts["activations"], memory.total)
                for memory in (planner.memory_of_stage(layout, stage) for stage in range(layout.pp))
            ]
    except Exception as error:  # what cannot be predicted must not end the training
        found.why = f"not predicted ({type(error).__name__}: {str(error)[:200]})"
    return found


def is_checkpointed(model: Any) -> bool:
    """By transformers, or by Accelerate's FSDP2."""
    wrapped = any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    name = "is_activation_checkpointing"  # its name from transformers 5.23 on
    return wrapped or bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))


class alone:
    """What is built and run inside is an ordinary model's, not the run's: patched functions find no Runtime."""

    def __enter__(self) -> None:
        self._runtime, slot.runtime = slot.runtime, None

    def __exit__(self, *error: object) -> None:
        slot.runtime = self._runtime


def lines(found: list[Any], traced: Traced, tp: int, unit: int) -> list[str]:
    """What is printed: one line for neighbouring ranks of which the same is to be said."""

    def line(rank: int) -> str:
        mine = found[rank]
        if mine is None:
            return "nothing was heard"
        pairs = [(part, *mine[part]) for part in PARTS]
        words = [f"{part} {'not known' if said < 0 else size(said)} / {size(real)}" for part, said, real in pairs]
        measured = size(mine["peak"][0]) if "peak" in mine else "not counted on the CPU"
        if traced.why:
            return ", ".join([*words, f"activations {traced.why}", f"peak - / {measured}"])
        kept, peak = traced.stages[rank % unit // tp]
        return ", ".join([*words, f"activations {size(kept)} / in the peak", f"peak {size(peak)} / {measured}"])

    text = [f"tp_plugin: memory of a rank in step {STEP}, predicted / measured:"]
    for words, ranks in groupby(range(len(found)), key=line):
        first, *rest = ranks
        text.append(f"  rank{f's {first}–{rest[-1]}' if rest else f' {first}'}: {words}")
    return text
