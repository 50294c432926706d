"""Pipeline stages under FSDP2, against plain FSDP2 on dp processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch
from test_fsdp2 import MICRO, _install, make, new_optimizer
from workers import run, sees_whole

STEPS = 3


@sees_whole
def case(tp: int, pp: int, model_type: str, settings: dict[str, Any], sync_each: bool = False) -> dict[str, Any]:
    from counted import ledger

    overrides = {"num_hidden_layers": 4, "use_cache": False}
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
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    weights = {name: torch.tensor(p.tolist()) for name, p in whole.items()}
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
        same(found, expected[rank // 2])
        assert found["moved"]["broadcast/pp"] == MICRO  # the losses: logits stay on the last stage


@pytest.mark.parametrize(
    "settings", [{"activation_checkpointing": True}, {"cpu_offload": True}], ids=lambda s: next(iter(s))
)
def test_settings(settings: dict[str, Any]) -> None:
    expected = run(2, case, 1, 1, "llama", settings)
    for rank, found in enumerate(run(4, case, 1, 2, "llama", settings)):
        same(found, expected[rank // 2])


def test_bf16() -> None:
    """As close to plain fp32 as plain bf16 is, within twice its spread (as in test_fsdp2.py)."""
    exact = run(2, case, 1, 1, "llama", {})
    plain = run(2, case, 1, 1, "llama", {"mixed_precision": "bf16"})
    for rank, found in enumerate(run(4, case, 1, 2, "llama", {"mixed_precision": "bf16"})):
        for key in ("losses", "norms"):
            known, rounded = exact[rank // 2][key], plain[rank // 2][key]
            far = max(abs(a - b) / b for a, b in zip(rounded, known, strict=True))
            assert max(abs(a - b) / b for a, b in zip(found[key], known, strict=True)) <= 2 * far < 0.05, key


def test_two_stages_of_two() -> None:
    expected = run(1, case, 1, 1, "qwen2", {})
    for found in run(4, case, 2, 2, "qwen2", {}):
        same(found, expected[0])


@sees_whole
def interleaved(pp: int, schedule: str) -> dict[str, Any]:
    """Two forwards, one without gradients between them, then their two backwards: weights are split meanwhile."""
    more = {"pp": pp, "pipeline_microbatches": 2, "pipeline_schedule": schedule} if pp > 1 else {}
    model, config = make(1, "llama", {"num_hidden_layers": 4}, **more)
    optimizer = new_optimizer(model)
    data_rank = torch.distributed.get_rank() // pp
    losses, norms = [], []
    for step in range(STEPS):
        first, second, other = (batch(config.vocab_size, seed=100 * step + 10 * at + data_rank) for at in range(3))
        one = model(**first).loss
        with torch.no_grad():
            losses.append(model(**other).loss.item())
        two = model(**second).loss
        (0.3 * one).backward()
        (0.7 * two).backward()
        losses += [one.item(), two.item()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        optimizer.step()
        optimizer.zero_grad()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": {name: torch.tensor(p.tolist()) for name, p in whole.items()}}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_forwards_before_backwards(schedule: str) -> None:
    expected = run(2, interleaved, 1, schedule)
    for rank, found in enumerate(run(4, interleaved, 2, schedule)):
        same(found, expected[rank // 2])


def states(tp: int, pp: int, folder: str, resumes: bool, full: bool) -> Any:
    """Two steps and a save of model and optimizer, then a step; or the last step of a run that resumes."""
    _install()
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    more = {"pp": pp, "pipeline_microbatches": 2} if pp > 1 else {}
    model, config = make(tp, "llama", {"num_hidden_layers": 4}, seed=5 if resumes else 0, **more)
    optimizer = new_optimizer(model)
    data_rank, is_first = torch.distributed.get_rank() // (tp * pp), torch.distributed.get_rank() == 0
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if not resumes:
        for number in range(2):
            one_step(model, optimizer, config.vocab_size, number, data_rank)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if resumes and full:
        found = torch.load(f"{folder}/full.pt", weights_only=True) if is_first else ({}, {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    elif resumes:
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        found, options = (state["model"], state["optimizer"]), StateDictOptions()
    else:
        dcp.save(state, checkpoint_id=f"{folder}/dcp")
        found = get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole)
        if is_first:
            torch.save(found, f"{folder}/full.pt")
        assert is_first or found == ({}, {})
    if resumes:
        set_model_state_dict(model, found[0], options=options)
        set_optimizer_state_dict(model, optimizer, found[1], options=options)
    return one_step(model, optimizer, config.vocab_size, 2, data_rank)


def one_step(model: Any, optimizer: Any, vocabulary: int, number: int, data_rank: int) -> tuple[float, float]:
    loss = model(**batch(vocabulary, seed=100 * number + data_rank)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def test_states_move(tmp_path: Path) -> None:
    """Saved at pp 2 x dp 2, whole and in parts; resumed there, at tp 2 x dp 2 and by plain FSDP2; and from plain."""
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    for folder in (ours, plain):
        folder.mkdir()
    expected = run(2, states, 1, 1, str(plain), False, False)
    for rank, found in enumerate(run(4, states, 1, 2, str(ours), False, False)):
        assert found == pytest.approx(expected[rank // 2], rel=1e-5)
    one, other = (torch.load(folder / "full.pt", weights_only=True) for folder in (plain, ours))
    assert list(one[0]) == list(other[0]) and list(one[1]["state"]) == list(other[1]["state"])
    assert one[1]["param_groups"][0]["params"] == other[1]["param_groups"][0]["params"]
    for name, tensor in one[0].items():
        torch.testing.assert_close(other[0][name], tensor, rtol=0, atol=2e-5)
    for full in (False, True):
        for folder, tp, pp in ((ours, 1, 2), (plain, 1, 2), (ours, 2, 1), (ours, 1, 1)):
            for rank, found in enumerate(run(2 * tp * pp, states, tp, pp, str(folder), True, full)):
                assert found == pytest.approx(expected[rank // (tp * pp)], rel=1e-5)
