"""Scripts near the classic loop agree with as many plain processes, too."""

from __future__ import annotations

import pytest

from .compare import LOSS, NORM, WEIGHTS, close, section_of, tensors_close, tensors_in

CASES = [("llama", 2, 2), pytest.param(("gpt2", 4, 1), marks=pytest.mark.full)]
SECTIONS = ["optimizer after the model", "split batches", "teacher", "own embeddings", "wrapped", "classification"]
SECTIONS += ["two models", "skipped", "nested", "best weights", "generation"]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}")
def runs(request, bench, checkpoints):
    model, tp, dp = request.param
    args = ("--models", str(checkpoints["llama"].parent), "--model", model)
    return bench.run("relatives", tp, dp, args), bench.run("relatives", 1, dp, args)


@pytest.mark.parametrize("section", SECTIONS)
def test_section(runs, section):
    run, plain = runs
    for who, got, expected in section_of(run, plain, section):
        for key in expected:
            close(got[key], expected[key], NORM if key == "norms" else LOSS, f"{who}: {key}")
    state = f"states/{section}.safetensors"
    if (plain.out / state).exists():
        tensors_close(tensors_in(run.out / state), tensors_in(plain.out / state), WEIGHTS, section)


def test_main_process_alone_evaluates(bench, checkpoints):
    args = ("--models", str(checkpoints["llama"].parent), "--alone")
    run, plain = bench.launch("relatives", 2, 2, args, timeout=90), bench.launch("relatives", 1, 2, args)
    for process, group in enumerate(run.layout.groups()):
        expected = plain.ranks[process]["main process alone"]
        for rank in group:
            close(run.ranks[rank]["main process alone"], expected, LOSS, f"rank {rank}")


@pytest.mark.full
def test_main_process_alone_generates_with_a_cache(bench, checkpoints):
    """It works, or every rank of the group is told within seconds; it never hangs."""
    args = ("--models", str(checkpoints["llama"].parent), "--alone", "--cache")
    run, plain = bench.launch("relatives", 2, 1, args, timeout=90), bench.launch("relatives", 1, 1, args)
    expected = plain.ranks[0]["main process alone"]
    for rank, own in enumerate(run.ranks):
        got = own["main process alone"]
        if "failed" in got:
            assert "rank 0" in got["failed"] and "generate" in got["failed"], f"rank {rank}: {got['failed']}"
        else:
            close(got, expected, LOSS, f"rank {rank}")
