"""Only the main process saves. It works, hinders nobody, and leaves an ordinary checkpoint."""

from __future__ import annotations

import pytest

from .compare import LOSS, checkpoints_equal, close

REST = (("state_dict", 2, 1), ("save_model", 2, 1))
CASES = [("save_pretrained", 2, 2), *(pytest.param(case, marks=pytest.mark.full) for case in REST)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}")
def runs(request, bench, checkpoints):
    how, tp, dp = request.param
    args = ("--models", str(checkpoints["llama"].parent), "--model", "llama", "--how", how)
    return bench.run("main_only_save", tp, dp, args, timeout=90), bench.run("main_only_save", 1, dp, args)


def test_checkpoint_in_the_middle(runs):
    run, plain = runs
    checkpoints_equal(run.out / "middle", plain.out / "middle")


def test_checkpoint_at_the_end(runs):
    run, plain = runs
    checkpoints_equal(run.out / "end", plain.out / "end")


def test_training_went_on_as_before(runs):
    run, plain = runs
    for process, group in enumerate(run.layout.groups()):
        for rank in group:
            close(run.ranks[rank]["losses"], plain.ranks[process]["losses"], LOSS, f"losses of rank {rank}")
