"""What the script's region costs: nothing inside of a step, and outside what docs/parameters.md says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from workers import run, sees_whole


def _sharded(model_type: str = "llama", **overrides: Any) -> Any:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    return tp_plugin.parallelize(build(config_for(model_type, **overrides)).train(), tp_size=2)


@contextlib.contextmanager
def _dispatched() -> Iterator[list[int]]:
    """How many functions were dispatched inside, in a list of one."""
    from tp_plugin.tensor.global_view import Calls

    found: list[int] = []
    before = Calls.count
    yield found
    found.append(Calls.count - before)


def _step(model: Any, optimizer: Any) -> None:
    loss = model(**batch(97, 0)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    model.zero_grad()


@sees_whole
def plain_steps(compiled: str) -> dict[str, Any]:
    model = _sharded()
    called = model
    if compiled:
        torch._dynamo.reset()
        called = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
        if compiled == "regions":
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
    found: dict[str, Any] = {}
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(model.parameters(), lr=1e-3)
        with _dispatched() as calls:
            for _ in range(3):
                _step(called, optimizer)
        found[kind.__name__] = calls
    with _dispatched() as calls:
        norm = model.lm_head.weight.norm()
    found["outside"] = calls, float(norm)
    return found


@pytest.mark.parametrize("compiled", ["", "whole", "regions"])
def test_nothing_is_dispatched_in_a_step(compiled: str) -> None:
    for found in run(2, plain_steps, compiled):
        assert found["AdamW"] == found["SGD"] == [0]
        assert found["outside"][0] == [1]


@sees_whole
def ddp_steps() -> list[int]:
    model = _sharded()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with _dispatched() as calls:
        for _ in range(2):
            _step(wrapped, optimizer)
    return calls


@sees_whole
def zero_steps(stage: int) -> list[int]:
    import deepspeed
    import test_zero

    test_zero.plain_again()
    model = _sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = test_zero.ds_config(stage, gradient_accumulation_steps=1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with _dispatched() as calls:
        for _ in range(2):
            engine.backward(engine(**batch(97, 0)).loss)
            engine.step()
    engine.destroy()
    return calls


@sees_whole
def fsdp2_steps() -> list[int]:
    import test_fsdp2

    model, _ = test_fsdp2.make(2, "llama", {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with _dispatched() as calls:
        for _ in range(2):
            _step(model, optimizer)
    return calls


def test_nor_under_ddp() -> None:
    assert run(4, ddp_steps) == [[0]] * 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nor_under_zero(stage: int) -> None:
    assert run(4, zero_steps, stage) == [[0]] * 4


def test_nor_under_fsdp2() -> None:
    assert run(4, fsdp2_steps) == [[0]] * 4


@sees_whole
def communication() -> dict[str, Any]:
    """Collectives of this unit, by what is done."""
    from tp_plugin.runtime.runtime import require

    model = _sharded()
    weight = model.get_input_embeddings().weight
    model(**batch(97, 0)).loss.backward()
    ledger = require().mesh.context.stats.total
    found = {}

    def count(what: str, function: Any) -> None:
        ledger.clear()
        function()
        found[what] = {key: (n, ledger.bytes[key]) for key, n in ledger.count.items()}

    ema = weight.detach().clone()
    count("elements", lambda: ema.mul_(0.9).add_(weight.detach(), alpha=0.1).clamp_(-1, 1).sign().mul(ema))
    count("whole operand", lambda: weight.grad.mul_(torch.ones(weight.shape)))
    count("whole data", lambda: setattr(weight, "data", torch.zeros(weight.shape)))
    count("shapes", lambda: (weight.shape, weight.numel(), len(weight), weight.grad.shape))
    count("norm", lambda: weight.grad.norm())
    count("sum", lambda: weight.grad.sum())
    count("row", lambda: weight.data[3])
    row = weight.data[5]
    count("row again", lambda: row.sum())
    count("write", lambda: weight.data.__setitem__(3, 0.0))
    return found


def test_communication() -> None:
    for found in run(2, communication):
        assert all(found[what] == {} for what in ("elements", "whole operand", "whole data", "shapes", "row again"))
        header = 12 * 8
        assert found["norm"] == {"all_gather/unit_cpu": (2, header + 4)}  # the meeting, and one fp32 number
        assert found["sum"] == {"all_gather/unit_cpu": (1, header), "all_reduce/unit_cpu": (1, 4)}
        for what in ("row", "write"):  # the meeting and the shards
            assert {key: n for key, (n, _) in found[what].items()} == {"all_gather/unit_cpu": 2}
