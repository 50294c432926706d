"""Weights that several ranks of a pipeline hold are compared among those that hold the same."""

from __future__ import annotations

import pytest
import torch
from models import build, config_for
from test_pipeline import batch_of
from workers import run

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import DivergenceError
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize


def case(model_type: str, tp: int, stages: int, name: str, rank: int) -> tuple[int, str]:
    """``name`` drifts apart on ``rank`` of the unit after the first step; which forward says so."""
    stop()
    model = build(config_for(model_type, num_hidden_layers=4)).train()
    parallelize(model, tp, options=RunConfig(tp, pp_size=stages))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        try:
            model(**batch_of(model, step)).loss.backward()
        except DivergenceError as error:
            return step, str(error)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 and torch.distributed.get_rank() == rank:
            model.get_parameter(name).data.mul_(1.01)
    return 5, ""


@pytest.mark.parametrize(
    ("model_type", "tp", "stages", "name", "rank"),
    [
        ("llama", 2, 2, "model.layers.1.input_layernorm.weight", 1),
        ("llama", 2, 2, "model.layers.3.input_layernorm.weight", 3),
        ("gpt2", 2, 2, "transformer.wte.weight", 2),
        ("gpt2", 1, 4, "transformer.wte.weight", 3),
    ],
)
def test_drift_is_seen_at_the_next_look(model_type: str, tp: int, stages: int, name: str, rank: int) -> None:
    assert run(4, case, model_type, tp, stages, name, -1) == [(5, "")] * 4
    for step, message in run(4, case, model_type, tp, stages, name, rank):
        assert step == 1 and f"{name!r} has drifted apart" in message
