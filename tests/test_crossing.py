"""What the warning about a TP group over several machines says, held against what is sent."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import pytest
from models import batch
from test_parallel import pair
from workers import run


def warning_case(model_type: str, tp: int) -> dict[str, Any]:
    from counted import training

    from tp_plugin.mesh.hosts import Machine
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard.topology_warning import bytes_per_token, warn_of_topology

    _, model = pair(tp, model_type)
    record: Any = model.tp_record
    before = training["bytes"]["all_reduce/tp"]
    model.train()
    loss = model(**batch(97, 0)).loss
    loss.backward()
    sent = training["bytes"]["all_reduce/tp"] - before
    mesh, said = require().mesh, io.StringIO()
    machines = [Machine(f"host{rank // 2}", "net") for rank in range(tp)]
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with contextlib.redirect_stderr(said):
        for _ in range(2):
            warn_of_topology(model, record.plan, mesh, machines)
    return {"sent": sent, "promised": 22 * bytes_per_token(model, record.plan), "said": said.getvalue()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_bytes_are_those_that_are_sent(model_type: str) -> None:
    for found in run(2, warning_case, model_type, 2):
        assert found["promised"] == found["sent"] > 0
        assert not found["said"], "both ranks are on one machine"


def test_one_rank_of_the_world_says_it_once() -> None:
    said = [found["said"] for found in run(4, warning_case, "llama", 4)]
    assert [text.count("warning") for text in said] == [1, 0, 0, 0]
    assert "(ranks [0, 1] on host0, ranks [2, 3] on host1)" in said[0]
    assert "5 times in the forward and 5 times in the backward" in said[0]
    assert "With 2 processes on a machine, tp_size: 2 keeps each group inside one" in said[0]
