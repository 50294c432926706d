"""Pipeline stages against one process: losses, every gradient, norms, weights, the saved state, and what was sent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import config_for
from workers import run, sees_whole

from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.runtime.runtime import require
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize

STEPS = 6


def batch_of(model: Any, step: int) -> dict[str, torch.Tensor]:
    """Unequal lengths and label tokens in every row, and another width at every step."""
    generator = torch.Generator().manual_seed(step)
    rows, width = 5, 7 + 2 * step
    ids = torch.randint(3, 97, (rows, width), generator=generator)
    lengths = torch.tensor([width, width - 3, 4, width - 1, 5])
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :3] = -100
    if type(model).__name__.endswith("ForMaskedLM"):
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.6, -100)
        labels[0, 0] = ids[0, 0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, loss_of: Any) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Clipped AdamW steps, two micro-batches of the script's each: losses, norms, and the first step's gradients."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    seen = []
    for step in range(STEPS):
        total = 0.0
        for part in (0, 1):
            loss = loss_of(model, batch_of(model, 2 * step + part)) / 2
            loss.backward()
            total += loss.item()
        if step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        seen.append((total, norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return seen, grads


def models_own(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def scripts_own(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    entry = logits.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    return -(entry * kept).sum() / kept.sum() + 0.01 * logits.square().mean()


@sees_whole
def case(model_type: str, tp: int, options: dict[str, Any], loss: str = "models_own") -> dict[str, Any]:
    loss_of = globals()[loss]
    config = config_for(model_type, num_hidden_layers=4)
    model = build(config, meta=False)
    plain = copy.deepcopy(model)
    stop()
    expected, plain_grads = train(plain, loss_of)
    parallelize(model, tp, options=RunConfig(tp, **options))
    stats = require().mesh.context.stats
    before = dict(stats.total.count)
    found, our_grads = train(model, loss_of)
    counts = {name: n - before.get(name, 0) for name, n in stats.total.count.items() if n != before.get(name, 0)}
    grads, weights = {}, {}
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.shape == theirs.shape, name
        weights[name] = (ours.detach() - theirs.detach()).abs().max().item()
    assert our_grads.keys() == plain_grads.keys()
    for name, theirs in plain_grads.items():
        grads[name] = (our_grads[name] - theirs).norm().item() / max(theirs.norm().item(), 1e-4)
    state = model.state_dict()
    saved = max((state[name].float() - value.float()).abs().max().item() for name, value in plain.state_dict().items())
    stop()
    return {
        "expected": expected, "found": found, "grads": grads, "weights": weights, "saved": saved, "counts": counts,
    }  # fmt: skip


def check(results: list[dict[str, Any]]) -> None:
    for found in results:
        for (loss, norm), (our_loss, our_norm) in zip(found["expected"], found["found"], strict=True):
            assert math.isclose(loss, our_loss, rel_tol=1e-5) and math.isclose(norm, our_norm, rel_tol=1e-5), found
        worst = max(found["grads"], key=found["grads"].__getitem__)
        assert found["grads"][worst] <= 1e-4, (worst, found["grads"][worst])
        assert max(found["weights"].values()) <= 3e-4 and found["saved"] <= 3e-4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_stages(model_type: str) -> None:
    check(run(2, case, model_type, 1, {"pp_size": 2, "pipeline_microbatches": 3}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_stages_of_two(model_type: str) -> None:
    check(run(4, case, model_type, 2, {"pp_size": 2, "pipeline_microbatches": 3}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_loss_of_the_scripts_own(model_type: str) -> None:
    check(run(2, case, model_type, 1, {"pp_size": 2, "pipeline_microbatches": 3}, "scripts_own"))


def test_a_loss_of_the_scripts_own_of_two_stages_of_two() -> None:
    check(run(4, case, "llama", 2, {"pp_size": 2, "pipeline_microbatches": 3}, "scripts_own"))


def test_all_forwards_first() -> None:
    options = {"pp_size": 2, "pipeline_microbatches": 3, "pipeline_schedule": "gpipe"}
    check(run(2, case, "llama", 1, options))
