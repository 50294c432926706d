"""Replicated parameters stay equal on the ranks of a TP group, to the last bit, whatever rounds their gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from workers import run

UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": False}
EVEN = {"num_key_value_heads": 1, "tie_word_embeddings": False}
STEPS = 50


def _make(overrides: dict[str, Any], tp: int = 2) -> Any:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    torch.manual_seed(0)
    return tp_plugin.parallelize(build(config_for("llama", **overrides)).train(), tp_size=tp)


def _replicated(model: Any) -> list[Any]:
    from tp_plugin.tensor.param_entry import layout_of

    return [p for p in model.parameters() if (layout := layout_of(p)) is None or not layout.is_sharded]


def _shared(model: Any) -> list[Any]:
    """Shards that are the same on all ranks."""
    from tp_plugin.tensor.param_entry import layout_of

    found = [(p, layout_of(p)) for p in model.parameters()]
    return [p for p, layout in found if layout is not None and layout.is_sharded and len(set(layout.parts)) == 1]


def _round_otherwise(grads: list[torch.Tensor]) -> None:
    """What another kernel on each rank would do: the last bits."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for grad in grads:
        grad.mul_(1 + 2e-7 * torch.randn(grad.shape, generator=generator))


def _far() -> float:
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard.audit import drift

    return max(drift(state) for state in require().models)


def loop_case(how: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """``STEPS`` steps of AdamW, clipped or not, of a plain loop or under DDP."""
    from counted import ledger

    model = _make(overrides)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if "ddp" in how else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled="scaler" in how)
    counts, data = set(), torch.distributed.get_rank() // 2
    for step in range(STEPS):
        for micro in range(1 + (step < 3)):
            scaler.scale(wrapped(**batch(97, 10 * step + 5 * micro + data)).loss).backward()
        _round_otherwise([p.grad for p in _replicated(model)])
        before = ledger["count"].copy()
        if "closure" in how:
            optimizer.step(lambda: torch.zeros(()))
        else:
            if "scaler" in how:
                scaler.unscale_(optimizer)
            if "clip" in how:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        counts.add((ledger["count"] - before)["broadcast/tp"])
        optimizer.zero_grad()
    return {"far": _far(), "counts": counts}


@pytest.mark.parametrize("how", ["clip", "closure", "scaler clip", "ddp clip", "ddp"])
def test_loops(how: str) -> None:
    """One broadcast in each step, of all that is replicated."""
    for found in run(4 if "ddp" in how else 2, loop_case, how, UNEVEN if "ddp" in how or how == "clip" else EVEN):
        assert found == {"far": 0.0, "counts": {1}}


def overlapping_case() -> torch.Tensor:
    """Two heads on three ranks, as a policy of one's own may say: the middle rank has both, the others one each."""
    from tp_plugin.policy import ParamLayout
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard.gradients import agree

    _make({}, 3)
    layout = ParamLayout((16, 3), 0, (((0, 8),), ((0, 16),), ((8, 16),)))
    mesh = require().mesh
    for ranks in layout.replica_groups:
        mesh.replicas(ranks)
    grad = layout.shard(torch.arange(1.0, 49).view(16, 3), mesh.unit.rank)
    _round_otherwise([grad])
    agree([(layout, grad)], mesh)
    return grad


def test_a_rank_that_has_all_meets_those_that_have_parts() -> None:
    first, both, last = run(3, overlapping_case)
    assert torch.equal(both[:8], first) and torch.equal(both[8:], last)


def alone_case() -> dict[str, int]:
    """An optimizer of something else, on one rank, meets nobody."""
    from counted import ledger

    _make(EVEN)
    before = ledger["count"].copy()
    if torch.distributed.get_rank() == 0:
        own = torch.nn.Linear(3, 3)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        own(torch.ones(2, 3)).sum().backward()
        torch.nn.utils.clip_grad_value_(own.parameters(), 0.5)
        optimizer.step()
    return dict(ledger["count"] - before)


def test_an_optimizer_of_something_else_meets_nobody() -> None:
    assert run(2, alone_case) == [{}, {}]


def zero_case(stage: int, overrides: dict[str, Any], bf16: bool, steps: int) -> dict[str, Any]:
    import deepspeed
    from test_zero import ds_config, plain_again

    plain_again()
    model = _make(overrides)
    alike = [*_replicated(model), *_shared(model)]
    for parameter in alike:
        parameter.register_hook(lambda grad: _rounded(grad))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ds_config(stage, **({"bf16": {"enabled": True}} if bf16 else {}))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(steps):
        engine.backward(engine(**batch(97, 10 * step + torch.distributed.get_rank() // 2)).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = [p.detach().clone() for p in alike]
    engine.destroy()
    return {"weights": weights}


def _rounded(grad: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    step = 2.0**-8 if grad.dtype == torch.bfloat16 else 2e-7
    return grad * (1 + step * (2 * torch.rand(grad.shape, generator=generator) - 1)).to(grad.dtype)


def assert_alike(found: list[dict[str, Any]], count: int) -> None:
    for unit in (found[:2], found[2:]):
        assert all(torch.equal(*both) for both in zip(*(one["weights"] for one in unit), strict=True))
        assert len(unit[0]["weights"]) == count


@pytest.mark.parametrize("stage, bf16", [(0, False), (0, True), (1, False), (2, False), (3, False)])
def test_deepspeed(stage: int, bf16: bool) -> None:
    """One key head for both ranks: what each layer has of that (two weights, two biases) is on both."""
    assert_alike(run(4, zero_case, stage, EVEN, bf16, 16), 9 + 2 * 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_of_uneven_shards(stage: int) -> None:
    """ZeRO 1 and 2 cut them elsewhere on each rank of a TP group."""
    assert_alike(run(4, zero_case, stage, UNEVEN, False, STEPS), 9)


def fsdp2_case() -> dict[str, Any]:
    from test_fsdp2 import make

    os.environ.pop("TP_PLUGIN_OPTIONS", None)
    model, _ = make(2, "llama", EVEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(10):
        model(**batch(97, 10 * step + torch.distributed.get_rank() // 2)).loss.backward()
        _round_otherwise([p.grad._local_tensor for p in _replicated(model)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {"far": _far()}


def test_fsdp2() -> None:
    assert run(4, fsdp2_case) == [{"far": 0.0}] * 4
