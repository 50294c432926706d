"""Logits of a split vocabulary are whole to a script, on all ranks and on the main process alone."""

from __future__ import annotations

import pytest

from .compare import LOSS, close, section_of

CASES = [pytest.param(("llama", 2, 1), marks=pytest.mark.full), ("gpt2", 2, 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}")
def runs(request, bench, checkpoints):
    model, tp, dp = request.param
    args = ("--models", str(checkpoints["llama"].parent), "--model", model)
    return bench.run("logits", tp, dp, args), bench.run("logits", 1, dp, args)


@pytest.mark.parametrize("section", ["main_process_reads", "distilled", "trainer"])
def test_section(runs, section):
    run, plain = runs
    for rank, (who, got, expected) in enumerate(section_of(run, plain, section)):
        if "seen" in expected:
            want = expected.pop("seen") if rank % run.layout.tp == 0 else []
            close(got.pop("seen"), want, 1e-4, f"{who}: what the main process saw")
            expected.pop("seen", None)
        close(got, expected, LOSS, who)
