"""``report_memory: true``: predicted against measured memory of real runs, said once; and nothing without the key."""

from __future__ import annotations

import contextlib
import io
import json
import os
import unittest.mock
from typing import Any

import accelerate.accelerator  # noqa: F401  (workers have more time for the imports of a module than for a case)
import peft  # noqa: F401
import pytest
import torch
from counted import ledger
from models import adapted, batch, build, config_for
from test_save_state import accelerated
from workers import run, sees_whole

from tp_plugin.config.keys import ENV_OPTIONS
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines import memory_report
from tp_plugin.errors import TPError

LLAMA = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "use_cache": False}
STEPS = 4


def steps_of(forward: Any, model: Any, optimizer: Any, zero: Any = None) -> dict[str, Any]:
    """STEPS steps of two micro-batches: losses, the report's figures and what was printed of it; collectives."""
    from tp_plugin.runtime.runtime import require

    figures: list[Any] = []
    original = memory_report.lines

    def lines(found: Any, traced: Any, *sizes: int) -> list[str]:
        figures.append((found, traced.stages, traced.why))
        return original(found, traced, *sizes)

    losses, said, told, drawn = [], io.StringIO(), [], []
    replica = require().mesh.data.rank
    with unittest.mock.patch.object(memory_report, "lines", lines), contextlib.redirect_stderr(said):
        for step in range(STEPS):
            for micro in range(2):
                loss = forward(**batch(LLAMA["vocab_size"], 10 * step + 2 * micro + replica)).loss
                zero.backward(loss) if zero is not None else loss.backward()
                losses.append(loss.item())
                if zero is not None:
                    zero.step()
            if zero is None:
                optimizer.step()
                optimizer.zero_grad()
            told.append(said.getvalue().count("memory of a rank"))
            drawn.append(torch.rand(1).item())
    return {
        "figures": figures, "said": said.getvalue(), "told": told, "losses": losses, "drawn": drawn,
        "sent": dict(ledger["count"]),
    }  # fmt: skip


def through_accelerate(report: bool, adapter: str = "", checkpointing: bool = False, optimizer: str = "AdamW") -> Any:
    os.environ[ENV_OPTIONS] = json.dumps({"report_memory": report, "report": "off"})
    with accelerated(2):
        from accelerate import Accelerator

        accelerator = Accelerator()
        model = build(config_for("llama", **LLAMA)).train()
        model = adapted(model, adapter) if adapter else model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kind = getattr(torch.optim, optimizer)
        model, prepared = accelerator.prepare(model, kind([p for p in model.parameters() if p.requires_grad], lr=1e-3))
        return steps_of(model, model, prepared)


def through_deepspeed(stage: int) -> Any:
    import deepspeed
    from test_zero import ds_config, plain_again

    import tp_plugin

    plain_again()
    os.environ[ENV_OPTIONS] = json.dumps({"report_memory": True, "report": "off"})
    model = tp_plugin.parallelize(build(config_for("llama", **LLAMA)).train(), tp_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage))
    try:
        return steps_of(engine, model, None, engine)
    finally:
        engine.destroy()


def through_fsdp2(checkpointing: bool) -> Any:
    from test_fsdp2 import make

    model, _ = make(2, "llama", LLAMA, activation_checkpointing=checkpointing, report_memory=True)
    return steps_of(model, model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def within(found: Any, world: int) -> None:
    ranks, stages, why = found
    assert len(ranks) == world and not why
    for rank in ranks:
        for part in ("weights", "gradients", "optimizer states"):
            said, real = rank[part]
            assert real > 0 and said == pytest.approx(real, rel=0.05), (part, rank)
    for kept, peak in stages:
        assert 0 < kept < peak


CASES = {
    "DDP": (through_accelerate, (True,)),
    "DDP, adapters, checkpointing": (through_accelerate, (True, "lora", True)),
    "ZeRO 1": (through_deepspeed, (1,)),
    "ZeRO 3": (through_deepspeed, (3,)),
    "FSDP2, checkpointing": (through_fsdp2, (True,)),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_is_measured(name: str) -> None:
    case, given = CASES[name]
    first, *others = run(4, case, *given)
    assert first["told"] == [0, 0, 1, 1] and len(first["figures"]) == 1
    within(first["figures"][0], 4)
    assert "weights" in first["said"] and "peak" in first["said"] and "not counted on the CPU" in first["said"]
    assert not any("memory of a rank" in other["said"] for other in others)


def test_training_is_as_without_it() -> None:
    """The same losses, random numbers and collectives, to the last bit; nothing is said without the key."""
    plain, reported = (run(4, through_accelerate, report) for report in (False, True))
    for without, with_it in zip(plain, reported, strict=True):
        for what in ("losses", "drawn", "sent"):
            assert without[what] == with_it[what], what
        assert "memory of a rank" not in without["said"] and not without["figures"]


def test_an_optimizer_that_the_plan_does_not_know() -> None:
    first = run(4, through_accelerate, True, "", False, "SGD")[0]
    assert "optimizer states not known / 0.0 KiB" in first["said"]


def failing_case() -> Any:
    rank = torch.distributed.get_rank()

    def fail(*args: Any) -> float:
        raise KeyError("of another kind")

    with unittest.mock.patch.object(memory_report, "_gradients", fail) if rank == 1 else contextlib.nullcontext():
        return through_accelerate(True)


def test_what_cannot_be_counted_is_said_and_training_goes_on() -> None:
    first, second, *others = run(4, failing_case)
    assert len(second["losses"]) == len(first["losses"]) == 2 * STEPS
    assert "rank 1 could not count what it holds (KeyError: 'of another kind')" in second["said"]
    assert first["figures"][0][0][1] is None and "memory of a rank" in first["said"]
    assert not any("could not" in other["said"] for other in others)


def stages_case() -> Any:
    import tp_plugin
    from tp_plugin.runtime.start import stop

    stop()
    os.environ[ENV_OPTIONS] = json.dumps({"report_memory": True, "report": "off"})
    model = tp_plugin.parallelize(build(config_for("llama", **LLAMA)).train(), tp_size=2, pp_size=2)
    return steps_of(model, model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def test_stages() -> None:
    first = run(4, stages_case)[0]
    within(first["figures"][0], 4)
    assert len(first["figures"][0][1]) == 2
    assert "  ranks 0–1: " in first["said"] and "  ranks 2–3: " in first["said"]


@sees_whole
def a_script_that_looks_at_whole_parameters() -> Any:
    return through_accelerate(True)


def test_shards_are_counted_while_the_script_sees_whole_parameters() -> None:
    within(run(4, a_script_that_looks_at_whole_parameters)[0]["figures"][0], 4)


def test_the_lines_of_a_device() -> None:
    """Which has a peak; ranks of which the same is said share a line, and of one nothing was heard."""
    from tp_plugin.engines.memory_report import Traced, lines

    gib = 2.0**30
    rank = {"weights": [gib, gib], "gradients": [gib, gib], "optimizer states": [-1, gib], "peak": [5 * gib]}
    traced = Traced()
    traced.stages = [(gib, 4 * gib)]
    said = lines([rank, dict(rank), None], traced, 1, 1)
    assert said[1:] == [
        "  ranks 0–1: weights 1.0 GiB / 1.0 GiB, gradients 1.0 GiB / 1.0 GiB, optimizer states not known / 1.0 GiB, "
        "activations 1.0 GiB / in the peak, peak 4.0 GiB / 5.0 GiB",
        "  rank 2: nothing was heard",
    ]
    traced.why = "not predicted (ValueError: no)"
    assert lines([rank], traced, 1, 1)[1].endswith("activations not predicted (ValueError: no), peak - / 5.0 GiB")


def test_the_key() -> None:
    assert RunConfig.parse(2, {"report_memory": True}).report_memory and not RunConfig.parse(2).report_memory
    with pytest.raises(TPError, match=r"tp_plugin\.report_memory: expected true or false, found 'yes'"):
        RunConfig.parse(2, {"report_memory": "yes"})


def out_of_memory(message: str, known: bool) -> tuple[str, str]:
    """What a rank says whose device has no memory left in the backward of the second step, and what it tells others."""
    from tp_plugin.runtime import crash_report
    from tp_plugin.runtime.runtime import require

    os.environ[ENV_OPTIONS] = json.dumps({"report": "on" if known else "off"})
    with accelerated(2), contextlib.redirect_stderr(io.StringIO()):
        from accelerate import Accelerator

        model = build(config_for("llama", **LLAMA)).train()
        model, optimizer = Accelerator().prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

        def raises(grad: torch.Tensor) -> None:
            raise torch.OutOfMemoryError(message)

        for step in range(2):
            loss = model(**batch(LLAMA["vocab_size"], step)).loss
            if step:
                loss.register_hook(raises)
            try:
                loss.backward()
            except torch.OutOfMemoryError as error:
                report = require().crash_report
                told, said = unittest.mock.Mock(), unittest.mock.Mock()
                with (
                    unittest.mock.patch.object(crash_report, "leave", told),
                    unittest.mock.patch.object(report, "_previous", said),
                ):
                    report._note(type(error), error, error.__traceback__)
                report.crashed = False
                assert said.call_args.args[1] is error
                return str(error), str(told.call_args.args[1])
            optimizer.step()
            optimizer.zero_grad()
    raise AssertionError("no error")


def test_out_of_memory_says_what_the_plan_would_change() -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    for error, told in run(4, out_of_memory, message, True):
        assert error == told and error.startswith(f"{message}\n(tp_plugin: tp 2 × pp 1 × dp 2, ddp, micro-batch 2 × 1")
        for words in (
            "on a rank by its plan",
            "tp 4 saves",
            "FSDP2 saves",
            "with checkpointing saves",
            "tp-plugin plan MODEL",
        ):
            assert words in error, error
    for error, _ in run(4, out_of_memory, message, False):
        assert (
            error == f"{message}\n(tp_plugin: `tp-plugin plan MODEL --gpus 4` says what fits and which config runs it)"
        )
