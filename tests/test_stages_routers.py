"""Mixtures of experts over pipeline stages: the auxiliary loss of their routers, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
from models import MOE, config_for
from test_pipeline import STEPS, batch_of, case, check
from workers import run, sees_whole

from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize

MIXTURES = ["mixtral", "gpt_oss", *(name for name in MOE if "moe" in name)]


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in MIXTURES[:3] else pytest.mark.full) for name in MIXTURES]
)
def test_the_auxiliary_loss_of_routers(model_type: str) -> None:
    """As of the whole batch, over the layers of all stages; the configs have a coefficient of 0.5."""
    how = "in_eval_mode" if model_type == "phimoe" else "as_it_is"  # (in training, its experts are drawn)
    for found in run(2, case, model_type, 1, {"pp_size": 2, "pipeline_microbatches": 3}, "models_own", how):
        check([found])
        # (one of all stages' sums, beside which parameters are in use)
        assert found["counts"]["all_reduce/pp"] == 2 * STEPS + 1


@sees_whole
def routed(tp: int) -> list[tuple[float, float]]:
    """The auxiliary loss by itself: evaluated, and trained on without labels; of one process and ours."""
    stop()
    model = build(config_for("mixtral", num_hidden_layers=4), meta=False)
    plain = copy.deepcopy(model)
    parallelize(model, tp, options=RunConfig(tp, pp_size=2, pipeline_microbatches=3))
    found = []
    for batch in (batch_of(model, 0), batch_of(model, 1)):
        outputs = []
        for one in (plain, model):
            one.zero_grad()
            with torch.no_grad():
                evaluated = one(**batch)
            unlabelled = {name: value for name, value in batch.items() if name != "labels"}
            auxiliary = one(**unlabelled).aux_loss
            auxiliary.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.grad is not None])
            outputs.append((evaluated.loss.item(), evaluated.aux_loss.item(), auxiliary.item(), norm.item()))
        found += list(zip(*outputs, strict=True))
    assert model(**batch).get("router_logits") is None
    stop()
    return found


def test_the_auxiliary_loss_by_itself() -> None:
    for found in run(4, routed, 2):
        for plain, ours in found:
            assert ours == pytest.approx(plain, rel=1e-5)
