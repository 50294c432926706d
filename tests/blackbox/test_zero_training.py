"""DeepSpeed scripts with `tp_size` report and save what they do at the same dp without it, at every ZeRO stage.

Each layout comes in by another door, and runs its cases one after the other in one launch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from .compare import LOSS, NORM, WEIGHTS, checkpoints_equal, close, files, same, tensors_close, tensors_in
from .zero import CASES, LAUNCHES

RUNS = [(name, *layout) for layout, (_, _, names) in LAUNCHES.items() for name in names]
REST = {(4, 1): pytest.mark.full}  # tests/test_zero.py has this layout in the ordinary run


@pytest.fixture
def runs(request, zero_launch):
    """A case's run and its oracle."""
    name, tp, dp = request.param
    return zero_launch(tp, dp).of(name), zero_launch(1, dp).of(name)


def cases(*scripts: str, weights_only: bool = False):
    wanted = [case for case in RUNS if CASES[case[0]][0] in scripts]
    if weights_only:  # the others save a training state, and no model
        wanted = [case for case in wanted if "_state" not in case[0]]
    chosen = [pytest.param(case, marks=REST.get(case[1:], ())) for case in wanted]
    return pytest.mark.parametrize("runs", chosen, indirect=True, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}")


def config_of(report: dict) -> dict:
    """What DeepSpeed was given, without what only the oracle needs."""
    config = dict(report["config"])
    if "optimizer" in config:
        config["optimizer"]["params"].pop("torch_adam", None)
    return config


def compare_loop(got: dict, expected: dict, loss: float, norm: float) -> None:
    assert config_of(got) == config_of(expected)
    same(got, expected, [key for key in expected if not isinstance(expected[key], list | dict)], "report")
    assert len(got["steps"]) == len(expected["steps"])
    for i, (step, want) in enumerate(zip(got["steps"], expected["steps"], strict=True)):
        same(step, want, ["ids", "tokens", "synced", "lr", "skipped"], f"step {i}")
        close(step["losses"], want["losses"], loss, f"losses of step {i}")
        close(step["mean_loss"], want["mean_loss"], loss, f"mean loss of step {i}")
        close(step["norm"], want["norm"], norm, f"gradient norm of step {i}")
    for found, want in zip(got["evaluations"], expected["evaluations"], strict=True):
        same(found, want, ["ids", "batches"], "evaluation")
        close(found["losses"], want["losses"], loss, "evaluation's losses")
        close(found["mean"], want["mean"], loss, "evaluation's mean")


@cases("zero_loop")
def test_loop(runs, request):
    run, plain = runs
    loss, norm = LOSS, NORM
    if "bf16" in request.node.name:
        exact = request.getfixturevalue("zero_launch")(1, run.layout.dp).of("fp32_stage3").report
        loss, norm = (2 * spread(plain.report, exact, key) + 2**-9 for key in ("mean_loss", "norm"))
    else:
        tokens = [[found["tokens"] for found in r.report["evaluations"]] for r in (run, plain)]
        assert tokens[0] == tokens[1]
    compare_loop(run.report, plain.report, loss, norm)
    for process, group in enumerate(run.layout.groups()):
        for rank in group:
            own, want = run.ranks[rank], plain.ranks[process]
            same(own, want, ["process_index", "ids"], f"rank {rank}")
            close(own["losses"], want["losses"], loss, f"losses on rank {rank}")
            close(own["norms"], want["norms"], norm, f"norms on rank {rank}")
            assert own["is_main"] == (rank == 0)
            # without this, a run on whole replicas would pass for tensor-parallel
            assert own["elements"] < want["elements"] * (1 / run.layout.tp + 0.1)


def spread(report: dict, exact: dict, key: str) -> float:
    """How far bf16 is from fp32, both plain."""
    pairs = [(a[key], b[key]) for a, b in zip(report["steps"], exact["steps"], strict=True) if b[key] is not None]
    return max(abs(a - b) / b for a, b in pairs)


@pytest.mark.parametrize(
    "name, tp, dp",
    [pytest.param(*case, marks=REST.get(case[1:], ())) for case in RUNS if case[0].startswith("load_state")],
)
def test_load_state_continues_the_curve(zero_launch, name, tp, dp):
    steps = zero_launch(1, dp).of(name.replace("load", "save")).report["steps"]
    close(zero_launch(tp, dp).of(name).report["steps"], steps[len(steps) // 2 :], LOSS, "resumed")


@cases("zero_trainer")
def test_trainer(runs):
    run, plain = runs
    assert run.report["world"] == run.layout.dp
    assert config_of(run.report) == config_of(plain.report)
    for report in (run.report, plain.report):
        report.pop("config", None)
        for entry in report["log"]:
            entry.pop("total_flos", None)  # plain ZeRO-3 counts a partitioned parameter as empty
    close(run.report, plain.report, LOSS, "Trainer's report")
    assert files(run.out / "final") == files(plain.out / "final")
    weights = [tensors_in(r.out / "final" / "model.safetensors") for r in (run, plain)]
    tensors_close(*weights, WEIGHTS, "the best model")
    reloads(run.out / "final")


@cases("zero_direct")
def test_own_initialize(runs):
    run, plain = runs
    close(run.report, plain.report, NORM, "report")
    for process, group in enumerate(run.layout.groups()):
        for rank in group:
            own, want = run.ranks[rank], plain.ranks[process]
            assert own["ids"] == want["ids"], f"rank {rank}: its loader gave other samples"
            close(own["losses"], want["losses"], LOSS, f"losses on rank {rank}")
    for folder in ("pretrained", "16bit"):
        if (plain.out / folder).is_dir():
            checkpoints_equal(run.out / folder, plain.out / folder)


@cases("zero_loop", weights_only=True)
def test_saved_weights(runs, request):
    run, plain = runs
    tolerance = 2**-7 if "bf16" in request.node.name else WEIGHTS  # bf16's spacing around one
    assert run.report["state_dict"] == plain.report["state_dict"]
    checkpoints_equal(run.out / "pretrained", plain.out / "pretrained", tolerance)
    # (of ZeRO-3 on one process, plain save_model writes a part only: it takes views of a flat buffer for tied weights)
    weights = [r.out / folder / "model.safetensors" for r, folder in ((run, "save_model"), (plain, "pretrained"))]
    tensors_close(*(dict(sorted(tensors_in(path).items())) for path in weights), tolerance, "save_model")


def reloads(folder) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("tp, dp", [pytest.param(*layout, marks=REST.get(layout, ())) for layout in LAUNCHES])
def test_nothing_is_compiled_or_left_behind(zero_launch, tp, dp):
    run = zero_launch(tp, dp)
    assert run.code == 0, run.tail()
    assert not (run.out / "compiled").exists()
    assert not list(Path("/dev/shm").glob("deepspeed*"))


def test_oracle_clips_and_moves_the_weights(zero_launch, checkpoints):
    plain = zero_launch(1, 1).of("stage3")
    assert max(step["norm"] or 0 for step in plain.report["steps"]) > 0.5
    before = AutoModelForCausalLM.from_pretrained(checkpoints["llama_tied"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(plain.out / "pretrained").state_dict()
    for name, tensor in before.items():
        assert torch.dist(after[name], tensor, p=float("inf")) > 1e-3, name
