"""lm-evaluation-harness (`pip install lm_eval`, which brings 40 packages: not among ours) on a sharded model."""

from __future__ import annotations

import pytest

from .compare import LOSS, close

pytestmark = pytest.mark.full


def test_the_numbers_are_those_of_one_process(bench, checkpoints):
    pytest.importorskip("lm_eval", reason="needs `pip install -c constraints.txt lm_eval`")
    args = ("--models", str(checkpoints["llama"].parent))
    got, expected = (bench.run("lm_eval_harness", tp, 1, args, timeout=280).report for tp in (2, 1))
    assert len(expected["samples"]["local_choices"]) == len(expected["samples"]["local_continued"]) == 10
    close(got["samples"], expected["samples"], LOSS, "answers")
    close(got["results"], expected["results"], LOSS, "metrics")
