"""A NaN in what one rank holds is the whole model's, on every rank: loss, norms, the scaler's decision, argmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import batch
from test_parallel import pair, rank
from workers import run

WHERE = {
    "columns": "model.layers.0.mlp.up_proj.weight",
    "rows": "model.layers.1.self_attn.o_proj.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
}


def weight_case(name: str) -> dict[str, Any]:
    """The last rank's last entry is NaN; for a replicated parameter, everybody's."""
    whole, sharded = pair(2)
    plan: Any = sharded.tp_record.plan
    split = plan.layouts[name].is_sharded
    with torch.no_grad():
        whole.get_parameter(name)[-1].fill_(float("nan"))
        if not split or rank() == 1:
            # the vocabulary of 97 is padded to 98 rows
            sharded.get_parameter(name)[-2 if "embed" in name or "head" in name else -1].fill_(float("nan"))
    found = {}
    for kind, model in (("whole", whole), ("sharded", sharded)):
        tokens = batch(97, 0)
        tokens["input_ids"][0, 2] = tokens["labels"][0, 2] = 96
        out = model(**tokens)
        out.loss.backward()
        gradients = [p.grad for p in model.parameters()]
        norms = [float(torch.nn.utils.get_total_norm(gradients, p)) for p in (2.0, float("inf"), 1.0)]
        found[kind] = {"numbers": [float(out.loss), *norms], "argmax": out.logits.argmax(-1).tolist()}
    return found


@pytest.mark.parametrize("where", list(WHERE))
def test_a_weight(where: str) -> None:
    for found in run(2, weight_case, WHERE[where]):
        assert [math.isnan(x) for x in found["whole"]["numbers"]] == [True] * 4
        assert [math.isnan(x) for x in found["sharded"]["numbers"]] == [True] * 4, found["sharded"]["numbers"]
        assert found["sharded"]["argmax"] == found["whole"]["argmax"]


def gradient_case(who: int) -> list[Any]:
    """Only a gradient is NaN, on one rank: of a sharded parameter."""
    _, sharded = pair(2)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sharded(**batch(97, 0)).loss).backward()
    if rank() == who:
        sharded.model.layers[1].mlp.down_proj.weight.grad[3, 3] = float("nan")
    gradients = [p.grad for p in sharded.parameters()]
    norms = [float(torch.nn.utils.get_total_norm(gradients, p)) for p in (2.0, float("inf"), float("-inf"), 1.0)]
    before = sharded.model.norm.weight.clone()
    scaler.step(optimizer)
    scaler.update()
    try:
        torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0, error_if_nonfinite=True)
        refused = False
    except RuntimeError:
        refused = True
    return [[math.isnan(x) for x in norms], torch.equal(before, sharded.model.norm.weight), scaler.get_scale(), refused]


@pytest.mark.parametrize("who", [0, 1])
def test_a_gradient(who: int) -> None:
    assert run(2, gradient_case, who) == [[[True] * 4, True, 4.0, True]] * 2
