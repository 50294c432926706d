"""What a rank of a real run holds, as CPU's allocator counts it: at the marks of a step, and at its peak."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "mark "
BUCKET = 100_000
"""Elements of DeepSpeed's buckets."""


class Allocations:
    """Bytes allocated inside and not freed, from the profiler's events; what was there before counts as nothing."""

    def __enter__(self) -> Allocations:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        gc.collect()
        with record_function(MARK + name):
            pass

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        found = sorted((e.start_ns(), e.name(), e.nbytes()) for e in events if e.name().startswith((MARK, "[memory]")))
        forwards, peaks = [], []
        ready = live = top = 0
        for _, name, size in found:
            live += size
            top = max(top, live)
            if name == MARK + "ready":
                ready = top = live
            elif name == MARK + "forward":
                forwards.append(live - ready)
            elif name == MARK + "backward":
                peaks.append(top - ready)
        # what an earlier run had left may go in any step, but once
        self.forward, self.peak = statistics.median(forwards), statistics.median(peaks)


def measured(
    tp: int,
    engine: str,
    model_type: str,
    overrides: dict[str, Any],
    size: int,
    length: int,
    checkpointing: bool = False,
    adapter: str = "",
    sequence_parallel: bool = False,
) -> dict[str, int]:
    """Bytes that this rank holds in a step of one micro-batch that is not the first.

    ``weights``, ``gradients``, ``optimizer``: of their tensors; ``activations``: what a forward has allocated when the
    loss is there; ``peak``: the most of the step beyond what was there before it.
    """
    from test_zero import plain_again

    options = {"sequence_parallel": True} if sequence_parallel else {}
    plain_again()
    gc.collect()
    with Allocations() as found:
        held = _run(found, tp, engine, model_type, overrides, size, length, checkpointing, adapter, options)
    return {**held, "activations": found.forward, "peak": found.peak}


def _bytes(tensors: Any) -> int:
    """Of their storages, each once."""
    from tp_plugin.mesh.dtensor_utils import held

    storages = [held(tensor).untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _gradients(model: Any, zero: Any) -> list[torch.Tensor]:
    if zero is None:
        return [p.grad for p in model.parameters() if p.grad is not None]
    optimizer = zero.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())
    found = [g for group in optimizer.averaged_gradients.values() if group for g in group if g is not None]
    return [g.clone() for g in found]  # some are a part of a tensor


def _states(optimizer: Any, zero: Any) -> list[torch.Tensor]:
    found = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    if zero is not None:
        own = zero.optimizer
        found += getattr(own, "fp32_partitioned_groups_flat", None) or own.single_partition_of_fp32_groups
    return found


def _run(
    found: Allocations, tp: int, engine: str, model_type: str, overrides: dict[str, Any], size: int, length: int,
    checkpointing: bool, adapter: str, options: dict[str, bool],
) -> dict[str, int]:  # fmt: skip
    import json
    import os

    from models import adapted, config_for
    from test_fsdp2 import make

    import tp_plugin
    from tp_plugin.cli.models import build
    from tp_plugin.config.keys import ENV_OPTIONS

    torch.manual_seed(0)
    os.environ[ENV_OPTIONS] = json.dumps(options)
    settings = config_for(model_type, **overrides)
    ids = torch.randint(3, settings.vocab_size, (size, length))
    batch = {"input_ids": ids, "labels": ids}
    given: dict[str, Any] = {}
    if engine == "fsdp2":
        if checkpointing:
            given["activation_checkpointing"] = True
        model, _ = make(tp, model_type, overrides, adapter=adapter, **given, **options)
    else:
        model = build(settings, meta=False)
        model = adapted(model, adapter) if adapter else model
        if tp > 1:
            model = tp_plugin.parallelize(model, tp_size=tp)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    zero: Any = None
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": size,
            "zero_optimization": {"stage": int(engine[-1]), "reduce_bucket_size": BUCKET},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        forward = zero
    elif engine == "ddp":
        from tp_plugin.runtime.runtime import current_mesh

        mesh = current_mesh()
        group = None if mesh is None else mesh.data.pg
        forward = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    for step in range(4):
        if step:
            found.mark("ready")
        loss = forward(**batch).loss
        if step:
            found.mark("forward")
        if zero is not None:
            zero.backward(loss)
        else:
            loss.backward()
        del loss
        if step:
            found.mark("backward")
            mine = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in model.parameters()]
            held = {"weights": _bytes(mine), "gradients": _bytes(_gradients(model, zero))}
            del mine
        if zero is not None:
            zero.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    held["optimizer"] = _bytes(_states(optimizer if zero is None else zero.optimizer.optimizer, zero))
    if zero is not None:
        zero.destroy()
    return held
