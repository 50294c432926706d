"""What scripts do to parameters and gradients after ``prepare``: the numbers of plain processes, under every engine."""

from __future__ import annotations

import pytest

from .zero import accelerate, write_config

TOLERANCE = 2e-5
BATCH = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}

NOT_UNDER_FSDP2 = (
    *("another_dtype_and_back", "average_of_a_copy", "swa", "hook_that_zeroes_a_neuron", "hook_that_scales"),
    *("gradients_by_autograd_grad", "swapped", "average_foreach", "printing", "hook_after_accumulation"),
    *("a_layer_by_itself", "an_embedding_by_itself", "loss_by_hand_and_autograd_grad", "soft_updates_of_another_model"),
)
"""Those that FSDP2 alone cannot run, or that it ignores (tests/test_script_region.py says why)."""

NOT_UNDER_ZERO3 = ("nearest_token", "a_layer_by_itself", "an_embedding_by_itself", "average_of_a_copy", "swa")
"""A forward inside of GatheredParameters, and copies: ZeRO-3 alone cannot run them."""


def _far(one: list[float], other: list[float]) -> float:
    if len(one) != len(other):
        return float("inf")
    size = max((abs(value) for value in other), default=0.0)
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0) / max(size, 1e-6)


def _compare(run, plain) -> None:
    wrong, seen = {}, 0
    for own in run.ranks:
        for name, found in own["found"].items():
            expected = plain.ranks[own["process_index"]]["found"][name]
            far = {what: _far(found[what], expected[what]) for what in found}
            seen += 1
            if not max(far.values()) <= TOLERANCE:
                wrong[name] = far
    assert seen and not wrong, "\n".join(f"{name}: {far}" for name, far in wrong.items())


@pytest.mark.parametrize("dp", [1, 2])
def test_ddp(bench, checkpoints, dp: int):
    args = ("--models", str(checkpoints["llama"].parent), "--model", "llama_tied")
    run, plain = (bench.run("habits_of_scripts", tp, dp, args) for tp in (2, 1))
    _compare(run, plain)


def test_fsdp2(bench, checkpoints):
    args = ("--models", str(checkpoints["llama"].parent), "--model", "llama_tied")
    plain = bench.run("habits_of_scripts", 1, 2, args)
    run = bench.run("habits_of_scripts", 2, 2, (*args, "--but", ",".join(NOT_UNDER_FSDP2)), entry="fsdp2", timeout=280)
    _compare(run, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(bench, checkpoints, tmp_path_factory, stage: int):
    args = ("--models", str(checkpoints["llama"].parent), "--model", "llama_tied")
    plain = bench.run("habits_of_scripts", 1, 2, args)
    path = write_config(tmp_path_factory.mktemp("ds") / "ds.json", accelerate(stage, **BATCH), 2)
    config = {"deepspeed_config": {"deepspeed_config_file": path}}
    but = ",".join(NOT_UNDER_ZERO3) if stage == 3 else ""
    run = bench.run("habits_of_scripts", 2, 2, (*args, "--but", but), entry="zero accelerate", config=config)
    _compare(run, plain)
