"""Pipeline stages under FSDP2, against plain FSDP2 on dp processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import batch
from test_fsdp2 import MICRO, make, new_optimizer
from workers import run, sees_whole

STEPS = 3


@sees_whole
def case(tp: int, pp: int, model_type: str, settings: dict[str, Any], sync_each: bool = False) -> dict[str, Any]:
    from counted import ledger

    overrides = {"num_hidden_layers": 4}
    more = {"pp": pp, "pipeline_microbatches": 2} if pp > 1 else {}
    model, config = make(tp, model_type, overrides, **settings, **more)
    optimizer = new_optimizer(model)
    data_rank = torch.distributed.get_rank() // (tp * pp)
    losses, norms, moved = [], [], {}
    for step in range(STEPS):
        before = dict(ledger["count"])
        for micro in range(MICRO):
            model.set_requires_gradient_sync(sync_each or micro == MICRO - 1)
            loss = model(**batch(config.vocab_size, seed=100 * step + 10 * micro + data_rank)).loss
            (loss / MICRO).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        moved = {key: n - before.get(key, 0) for key, n in ledger["count"].items()}
    weights = {
        n: torch.tensor(p.full_tensor().tolist() if hasattr(p, "full_tensor") else p.tolist())
        for n, p in model.named_parameters()
    }
    return {"losses": losses, "norms": norms, "weights": weights, "moved": moved}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "norms"):
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found[key], expected[key], strict=True)), (
            found[key],
            expected[key],
        )
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 2e-5, name


@pytest.mark.parametrize("sync_each", [False, True])
def test_two_stages(sync_each: bool) -> None:
    expected = run(2, case, 1, 1, "llama", {}, sync_each)
    for rank, found in enumerate(run(4, case, 1, 2, "llama", {}, sync_each)):
        print(found["moved"])
        same(found, expected[rank // 2])


def test_two_stages_of_two() -> None:
    expected = run(1, case, 1, 1, "qwen2", {})
    for found in run(4, case, 2, 2, "qwen2", {}):
        same(found, expected[0])
