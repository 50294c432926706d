"""Trainer's torch_compile, which goes through Accelerate's dynamo settings."""

from __future__ import annotations

import pytest

from .compare import LOSS, WEIGHTS, close, tensors_close, tensors_in


@pytest.mark.parametrize("entry", ["yaml", pytest.param("stages2", marks=pytest.mark.full)])
def test_trainer_compiles(bench, checkpoints, entry):
    args = ("--model", str(checkpoints["llama"]))
    run, plain = bench.run("trainer", 2, 1, (*args, "--compile"), entry=entry), bench.run("trainer", 1, 1, args)
    close(run.report, plain.report, LOSS, "Trainer's report")
    weights = [tensors_in(r.out / "final" / "model.safetensors") for r in (run, plain)]
    tensors_close(*weights, WEIGHTS, "the best model")
