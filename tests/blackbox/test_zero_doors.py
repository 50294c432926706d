"""Single runs by the ways in that the chains of test_zero_training.py do not take, against the same oracle."""

from __future__ import annotations

import pytest

from .compare import LOSS, NORM, checkpoints_equal, close
from .zero import arguments


@pytest.fixture
def plain(zero_launch):
    return zero_launch(1, 1)


def test_deepspeed_launcher(bench, checkpoints, tmp_path, plain):
    """`deepspeed --num_gpus 2 train.py --deepspeed_config ds.json`"""
    words = arguments(tmp_path, "path2", checkpoints["llama"].parent, 2)
    run = bench.run("zero_direct", 2, 1, tuple(words), entry="zero deepspeed")
    expected = plain.of("path2")
    close(run.report, expected.report, NORM, "report")
    for folder in ("pretrained", "16bit"):
        checkpoints_equal(run.out / folder, expected.out / folder)
    assert not (run.out / "compiled").exists()


def test_keys_of_accelerate_only(bench, checkpoints, plain):
    """No JSON: Accelerate's own keys, ours beside them, and `use_cpu`. Another stage, the same numbers."""
    section = {"zero_stage": 2, "gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    config = {"tp_size": 2, "use_cpu": True, "mixed_precision": "no", "deepspeed_config": section}
    words = ("--models", str(checkpoints["llama"].parent), "--model", "llama")
    run = bench.run("zero_loop", 2, 1, words, entry="zero accelerate", config=config, real=True)
    expected = plain.of("fp32_stage3")
    assert (run.report["stage"], run.report["train_batch_size"]) == (2, expected.report["train_batch_size"])
    for key in ("steps", "evaluations"):
        close(run.report[key], expected.report[key], LOSS, key)
    checkpoints_equal(run.out / "pretrained", expected.out / "pretrained")


@pytest.mark.full  # tests/test_zero_checkpoints.py has it in the ordinary run
def test_trainer_resumes_at_another_tp(bench, checkpoints, tmp_path, plain, zero_launch):
    """torchrun, the key in the file that `--deepspeed` names; from a checkpoint of tp 2 on."""
    half = zero_launch(2, 1).of("trainer3").out / "trainer" / "checkpoint-8"  # of 12
    words = [w.replace("{out}", str(tmp_path)) for w in arguments(tmp_path, "trainer3", checkpoints["llama"].parent, 4)]
    run = bench.launch("zero_trainer", 4, 1, (*words, "--resume", str(half)), entry="zero torchrun", timeout=150)
    assert run.code == 0, run.tail()
    log, expected = (r.report["log"] for r in (run, plain.of("trainer3")))
    for entry in (*log, *expected):
        entry.pop("total_flos", None)
        entry.pop("train_loss", None)  # the mean since the resume
    close(log, expected, LOSS, "log")
