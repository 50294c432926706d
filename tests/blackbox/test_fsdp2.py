"""Scripts launched with FSDP2 and `tp_size` report and save what plain FSDP2 does at the same dp."""

from __future__ import annotations

import pytest

from tp_plugin.cli.main import main

from .compare import LOSS, NORM, WEIGHTS, close, same, tensors_close, tensors_in

FULL = {"fsdp_state_dict_type": "FULL_STATE_DICT"}
SHARDED = {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}
FRUGAL = SHARDED | {
    "fsdp_cpu_ram_efficient_loading": True
}  # only rank 0 reads the checkpoint, and makes up what it lacks
CASES = [
    ("llama_headless", 2, 2, FRUGAL, "fsdp2"),
    ("llama", 2, 2, FULL, "fsdp2 stages2"),
    pytest.param("gpt2", 4, 1, FULL, "fsdp2", marks=pytest.mark.full),
    pytest.param("llama_tied", 2, 1, SHARDED, "fsdp2", marks=pytest.mark.full),
    pytest.param("llama_headless", 4, 1, FRUGAL, "fsdp2 stages2", marks=pytest.mark.full),
]


@pytest.mark.parametrize("model, tp, dp, config, by", CASES, ids=lambda value: "" if isinstance(value, dict) else None)
def test_loop(bench, checkpoints, model, tp, dp, config, by):
    args = ("--models", str(checkpoints["llama"].parent), "--model", model)
    entries = {tp: by, 1: "fsdp2"}
    run, plain = (bench.run("loop", t, dp, args, entry=entries[t], config=config, real=t > 1) for t in (tp, 1))
    keys = [key for key in plain.report if key not in ("steps", "evaluations")]
    same(run.report, plain.report, keys, str(run.layout))
    for i, (got, want) in enumerate(zip(run.report["steps"], plain.report["steps"], strict=True)):
        same(got, want, ["ids", "batch_size", "tokens", "last_of_epoch", "synced", "lr"], f"step {i}")
        close(got["losses"], want["losses"], LOSS, f"losses of step {i}")
        close(got["norm"], want["norm"], NORM, f"gradient norm of step {i}")
    assert max(step["norm"] or 0 for step in plain.report["steps"]) > 0.5, "clipping was never active"
    for got, want in zip(run.report["evaluations"], plain.report["evaluations"], strict=True):
        same(got, want, ["ids", "tokens", "count", "logits_width", "batches"], "evaluation")
        close(got["losses"], want["losses"], LOSS, "evaluation's losses")
    for folder in ("pretrained", "save_model"):
        found, expected = (tensors_in(r.out / folder / "model.safetensors") for r in (run, plain))
        tensors_close(found, expected, WEIGHTS, folder)
    for process, group in enumerate(run.layout.groups()):
        for rank in group:
            own, want = run.ranks[rank], plain.ranks[process]
            same(own, want, ["process_index", "ids"], f"rank {rank}")
            assert own["is_main"] == (rank == 0)
            # a DTensor counts all rows of the TP rank's tensor here; tests/test_fsdp2.py counts what is held
            assert own["bytes"] < want["bytes"] * (1 / tp + 0.1), "a run on whole replicas would pass for parallel"


# (tests/test_fsdp2.py moves them in the ordinary run)
@pytest.mark.full
@pytest.mark.parametrize("config", [FULL, SHARDED], ids=["full", "sharded"])
def test_save_state_resumes_here_and_elsewhere(bench, checkpoints, config):
    args = ("--model", str(checkpoints["llama_tied"]))
    launch = {"entry": "fsdp2", "config": config}
    run, plain = (bench.run("resume", tp, 2, args, **launch) for tp in (2, 1))
    close(run.report, plain.report, LOSS, "uninterrupted")
    saved = [str(r.out / "checkpoints" / "checkpoint_0") for r in (run, plain)]
    # (plain Accelerate shuffles otherwise after load_state at dp = 2: the oracle is its own resumed run)
    rest = bench.run("resume", 1, 2, (*args, "--resume", saved[1]), **launch).report["steps"]
    for tp, origin in ((2, saved[0]), (1, saved[0]), (2, saved[1])):
        again = bench.run("resume", tp, 2, (*args, "--resume", origin), **launch)
        close(again.report["steps"], rest, LOSS, f"resumed at tp {tp} from {origin}")


TRAINERS = [
    pytest.param("fsdp2", SHARDED, id="sharded"),
    pytest.param("fsdp2 stages2", SHARDED, id="sharded, stages"),
    pytest.param("fsdp2", FULL, marks=pytest.mark.full, id="full"),
    pytest.param("fsdp2 stages2", FULL, marks=pytest.mark.full, id="full, stages"),
]


@pytest.mark.parametrize("entry, config", TRAINERS)
def test_trainer(bench, checkpoints, tmp_path, entry, config):
    """Its log, evaluation and best checkpoint; gone on with from a checkpoint in the middle; exported from the last."""
    args = ("--model", str(checkpoints["llama"]))
    launch = {"entry": entry, "config": config}
    run = bench.run("trainer", 2, 2, args, **launch)
    # (plain processes race for the folder of a sharded one: they load an older best one, or hang)
    plain = bench.run("trainer", 1, 2, args, entry="fsdp2", config=FULL)
    close(run.report, plain.report, LOSS, "Trainer's report")
    weights = [tensors_in(r.out / "final" / "model.safetensors") for r in (run, plain)]
    tensors_close(*weights, WEIGHTS, "the best model")
    assert main(["export", str(run.out / "trainer" / "checkpoint-6"), str(tmp_path / "exported")]) == 0
    tensors_close(tensors_in(tmp_path / "exported" / "model.safetensors"), weights[0], 0, "exported")
    again = bench.run("trainer", 2, 2, (*args, "--resume", str(run.out / "trainer" / "checkpoint-4")), **launch)
    close(again.report["log"][:-1], plain.report["log"][:-1], LOSS, "resumed")
    tensors_close(tensors_in(again.out / "final" / "model.safetensors"), weights[1], WEIGHTS, "resumed")


def test_fsdp1_is_refused_before_anything_starts(bench, checkpoints):
    args = ("--models", str(checkpoints["llama"].parent))
    old = {"fsdp_version": 1, "fsdp_reshard_after_forward": "FULL_SHARD"}
    run = bench.launch("reached", 2, 1, args, entry="fsdp2", config=old, timeout=60)
    assert run.code != 0
    assert not list(run.out.glob("rank*.json")), "the script got its model before anybody objected"
    assert any("fsdp_version: 1" in line and "fsdp_version: 2" in line for line in run.output.splitlines()), run.tail()
