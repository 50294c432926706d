"""Logits of a split vocabulary are whole to a script, on all ranks and on the main process alone."""

from __future__ import annotations

import pytest

from .compare import LOSS, close

CASES = [pytest.param(("llama", 2, 1), marks=pytest.mark.full), ("gpt2", 2, 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}")
def runs(request, bench, checkpoints):
    model, tp, dp = request.param
    args = ("--models", str(checkpoints["llama"].parent), "--model", model)
    return bench.run("logits", tp, dp, args), bench.run("logits", 1, dp, args)


@pytest.mark.parametrize("section", ["main_process_reads", "distilled", "trainer"])
def test_section(runs, section):
    run, plain = runs
    for process, group in enumerate(run.layout.groups()):
        expected = dict(plain.ranks[process][section])
        assert "failed" not in expected, f"the plain run failed:\n{expected['failed']}"
        for rank in group:
            got = dict(run.ranks[rank][section])
            assert "failed" not in got, f"rank {rank} failed:\n{got['failed']}"
            assert got.keys() == expected.keys()
            for key in expected.keys() - {"seen"}:
                close(got[key], expected[key], LOSS, f"{section}, rank {rank}: {key}")
            if "seen" in expected:
                want = expected["seen"] if run.ranks[rank] is run.ranks[group[0]] else []
                close(got["seen"], want, 1e-4, f"rank {rank}: what the main process saw")
