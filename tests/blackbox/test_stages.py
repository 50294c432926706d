"""Pipeline stages under HF Trainer, TRL, PEFT and Accelerate's checkpoints, against plain processes."""

from __future__ import annotations

import pytest

from .compare import LOSS, close
from .test_checkpoints import first_state
from .test_trainers import TRAINERS, TUNERS, assert_tuned, folder, start  # noqa: F401  # fixtures


@pytest.mark.parametrize("case", [case for case in TRAINERS if case != "generated"])
def test_trainer(start, case):  # noqa: F811
    got, expected = start("trainers", 2, 2, "stages2")[case], start("trainers", 1, 2)[case]
    assert isinstance(expected, dict), expected
    close(got, expected, LOSS, case)
    assert "resumed" not in case or got["exact"]


def test_an_encoder_decoder_is_refused(start):  # noqa: F811
    said = start("trainers", 2, 2, "stages2")["generated"]
    assert "T5ForConditionalGeneration cannot be cut into pipeline stages: it has" in said and "pp_size: 1" in said


@pytest.mark.parametrize("case", TUNERS)
def test_tuner(start, case):  # noqa: F811
    assert_tuned(start("tuners", 2, 2, "stages2")[case], start("tuners", 1, 2)[case], case)


def test_states_move_between_stages_and_plain(bench, checkpoints):
    args = ("--model", str(checkpoints["llama_tied"]))
    plain, staged = bench.run("resume", 1, 1, args), bench.run("resume", 2, 1, args, entry="stages2")
    close(staged.report, plain.report, LOSS, "uninterrupted")
    half = len(plain.report["steps"]) // 2
    for tp, entry, origin in ((1, "yaml", staged), (4, "stages2", plain)):
        run = bench.run("resume", tp, 1, (*args, "--resume", first_state(origin)), entry=entry)
        close(run.report["steps"], plain.report["steps"][half:], LOSS, f"resumed with {entry}")
