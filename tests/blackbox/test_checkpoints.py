"""Training states: HF Trainer's log and checkpoints, Accelerate's save_state; resumed at another tp_size as well."""

from __future__ import annotations

import pytest

from .compare import LOSS, WEIGHTS, close, tensors_close, tensors_in


def first_state(run) -> str:
    return str(run.out / "checkpoints" / "checkpoint_0")


@pytest.mark.full  # test_trainers.py has more of it in the ordinary run
@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
def test_trainer_logs_what_it_logs_on_dp_processes(bench, checkpoints, tp, dp):
    args = ("--model", str(checkpoints["llama"]))
    run, plain = bench.run("trainer", tp, dp, args), bench.run("trainer", 1, dp, args)
    assert run.report["world"] == dp
    close(run.report, plain.report, LOSS, "Trainer's report")
    weights = [tensors_in(r.out / "final" / "model.safetensors") for r in (run, plain)]
    tensors_close(*weights, WEIGHTS, "the best model")
    kept = [sorted(p.name for p in (r.out / "trainer").iterdir()) for r in (run, plain)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("tp, origin", [(4, 1), pytest.param(1, 2, marks=pytest.mark.full)])
def test_trainer_resumes_at_another_tp(bench, checkpoints, tp, origin):
    args = ("--model", str(checkpoints["llama"]))
    saved = {tp: str(bench.run("trainer", tp, 1, args).out / "trainer" / "checkpoint-8") for tp in {1, origin}}
    plain = bench.run("trainer", 1, 1, (*args, "--resume", saved[1]))
    run = bench.run("trainer", tp, 1, (*args, "--resume", saved[origin]))
    close(run.report, plain.report, LOSS, f"resumed at tp {tp} from tp {origin}")


@pytest.mark.full  # tests/test_save_state.py has it in the ordinary run
def test_save_state_resumes_at_another_tp(bench, checkpoints):
    args = ("--model", str(checkpoints["llama_tied"]))
    plain, sharded = (bench.run("resume", tp, 1, args) for tp in (1, 2))
    close(sharded.report, plain.report, LOSS, "uninterrupted")
    half = len(plain.report["steps"]) // 2
    for tp, origin in ((1, sharded), (3, plain)):
        run = bench.run("resume", tp, 1, (*args, "--resume", first_state(origin)))
        close(run.report["steps"], plain.report["steps"][half:], LOSS, f"resumed at tp {tp}")


@pytest.mark.full
def test_save_state_resumes_dropout(bench, checkpoints):
    """The masks that the run would have drawn."""
    args = ("--model", str(checkpoints["gpt2_dropout"]))
    whole = bench.run("resume", 2, 1, args)
    again = bench.run("resume", 2, 1, (*args, "--resume", first_state(whole)))
    steps = whole.report["steps"]
    close(again.report["steps"], steps[len(steps) // 2 :], LOSS, "resumed")
