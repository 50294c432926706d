"""The launch report and the line of the first step: what they say, once, and that they cost the steps nothing."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from models import batch
from test_parallel import pair
from workers import run

from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.launch_report import where
from tp_plugin.errors import TPError


def reported_case() -> dict[str, Any]:
    """What this rank prints of two steps of two micro-batches each."""
    from tp_plugin.engines.launch_report import announce
    from tp_plugin.runtime.runtime import require

    _, model = pair(2, tie_word_embeddings=True)
    runtime = require()
    before = runtime.mesh.context.stats.total.as_dict()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        announce(runtime, "one replica")
        after = runtime.mesh.context.stats.total.as_dict()
        announce(runtime, "one replica")
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            for seed in range(2):
                model(**batch(97, seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tokens = 2 * batch(97, 0)["input_ids"].numel()
    return {"said": said.getvalue(), "silent": before == after, "measuring": runtime.progress.first_step, "of": tokens}


def test_it_is_said_once_by_the_first_rank() -> None:
    first, second = run(2, reported_case)
    assert second["said"] == "" and first["silent"] and second["silent"], "the report communicates"
    lines = first["said"].splitlines()
    assert len(lines) <= 15
    table = dict(found.groups() for line in lines[1:-1] if (found := re.match(r" (\S.*?)  +(\S.*?) *$", line)))
    assert table["model"].startswith("LlamaForCausalLM, policy registered")
    assert "tp 2 × dp 1 = 2; one replica" in table["ranks"]
    assert table["where"].startswith("ranks 0–1 on ") and "(cpu); each 2 in a row hold one model" in table["where"]
    assert "a rank holds" in table["parameters"] and "vocabulary" in table["parameters"]
    assert "all-reduces (forward + backward) of" in first["said"]
    assert first["said"].count("the first optimizer step took") == 1
    assert "(2 micro-batches)" in lines[-1] and "tokens/s per rank" in lines[-1] and "on rank 0" in lines[-1]
    assert first["measuring"] is None


def test_the_next_random_number_is_the_script_s_own() -> None:
    """In a process of its own: what draws is an import (rich), the first one."""
    script = """
import random, sys
import tp_plugin.engines.launch_report as report
assert "rich.style" not in sys.modules
random.seed(0)
state = random.getstate()
report._print({"model": "llama"})
assert "rich.style" in sys.modules and random.getstate() == state
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_off() -> None:
    assert RunConfig.parse(2, {"report": False}) == RunConfig.parse(2, {"report": "off"})
    assert not RunConfig.parse(2, {"report": "off"}).report and RunConfig.parse(2).report
    with pytest.raises(TPError, match=r"tp_plugin\.report: expected on or off, found 'never'"):
        RunConfig.parse(2, {"report": "never"})


def test_where_ranks_are() -> None:
    places = [(f"node{n}", f"cuda:{d}") for n in range(2) for d in range(4)]
    assert where(places, 4) == (
        "ranks 0–3 on node0 (cuda:0 to cuda:3), ranks 4–7 on node1 (cuda:0 to cuda:3); each 4 in a row hold one model"
    )
    many = [(f"n{n}", "cuda:0") for n in range(10)]
    assert "… 6 more machines" in where(many, 2)
