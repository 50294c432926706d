"""Trainer's 8-bit optimizers against the same script on dp plain processes: no farther off than 8 bits are from 32."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from .compare import LOSS, close, tensors_in
from .conftest import randomize

pytest.importorskip("bitsandbytes")

SHAPE = {"hidden_size": 64, "intermediate_size": 1000, "num_attention_heads": 4, "head_dim": 128}
IN_32 = {"adamw_8bit": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_32bit", "lion_8bit": "lion_32bit"}


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("eight_bit")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=64, num_hidden_layers=1, pad_token_id=0))
    randomize(model)
    model.save_pretrained(root / "model")
    given = ("--models", str(root), "--model", "model")
    return [bench.run("eight_bit", tp, 2, given, timeout=280) for tp in (2, 1)]


def weights(run, optimizer: str, name: str) -> dict:
    return tensors_in(run.out / optimizer / name / "model.safetensors")


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return float(sum((a[name].double() - value.double()).square().sum() for name, value in b.items()) ** 0.5)


@pytest.mark.parametrize("optimizer", IN_32)
def test_trainer(runs, optimizer):
    got, expected = runs
    # before the first step; a gradient's last digits, too, may give another code
    close(got.report[optimizer]["log"][0], expected.report[optimizer]["log"][0], LOSS, "log")
    apart = distance(*(weights(run, optimizer, "final") for run in runs))
    assert apart <= distance(weights(expected, optimizer, "final"), weights(expected, IN_32[optimizer], "final"))


@pytest.mark.parametrize("optimizer", IN_32)
def test_trainer_resumes_to_the_last_bit(runs, optimizer):
    for run in runs:
        report = run.report[optimizer]
        assert report["again"][-3:-1] == report["log"][-3:-1]
        assert distance(*(weights(run, optimizer, name) for name in ("final", "again"))) == 0
