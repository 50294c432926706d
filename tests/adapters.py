"""PEFT's adapters beside sharded layers, against plain PEFT on one process: everything that a user would notice."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import peft  # here, where workers have time for it
import pytest
import torch
from counted import ledger
from models import batch, build, config_for, install_peft, unpatched

STEPS = 6


def adapter_case(
    tp: int,
    model_type: str,
    overrides: dict[str, Any],
    config: Any,
    options: Any = None,
    stir: str = "",
    after_step: Callable[[Any, int], None] | None = None,
    merges: bool = True,
    looks_whole: bool = False,
    base: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Six clipped steps of ``config`` on a model and on its sharded copy, then saved, reloaded, merged.

    Args:
        stir: trainable parameters with one of these words in their names (comma-separated; empty: all) get noise, so
            that no gradient is zero.
        after_step: what a script calls after each step.
        looks_whole: the case is marked ``@sees_whole``.
        base: what makes the model (default: :func:`build`).
    """
    from tp_plugin.engines import peft as engine
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    torch_utils.install()
    install_peft()
    torch.manual_seed(0)
    base = base or functools.partial(build, config_for(model_type, **overrides))
    whole = peft.get_peft_model(base(), config).train()
    words = stir.split(",")
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad and any(word in name for word in words):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    sharded, again = copy.deepcopy(whole), copy.deepcopy(whole)
    parallelize(sharded, tp, options=options)
    plan = sharded.base_model.model.tp_record.plan
    mesh = require().mesh
    found: dict[str, Any] = {name: [] for name in ("losses", "norms", "outputs", "sent")}
    grads: list[dict[str, torch.Tensor]] = []
    optimizers = []
    for model in (whole, sharded):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        optimizers.append(optimizer)
        for step in range(STEPS):
            before = dict(ledger["count"])
            output = model(**batch(97, step))
            sent = {key: ledger["count"][key] - before.get(key, 0) for key in ledger["count"]}
            if step == 1:
                found["sent"].append({key: count for key, count in sent.items() if count and key.endswith("/tp")})
                found["outputs"].append(output.logits.detach() + 0.0)
            output.loss.backward()
            found["losses"].append(output.loss.item())
            if step == 0:
                grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            parameters = [p for p in model.parameters() if p.requires_grad]
            found["norms"].append(torch.nn.utils.clip_grad_norm_(parameters, 0.1).item())
            optimizer.step()
            if after_step is not None:
                after_step(model, step)
            optimizer.zero_grad()
    deviations = {}
    for name, grad in grads[1].items():
        inner = name.removeprefix("base_model.model.")
        layout = plan.layouts.get(inner)
        gathered = grad if looks_whole or layout is None else layout.gather(mesh.unit_cpu.gather_objects(grad))
        expected = grads[0][name]
        assert expected.norm() > 0, f"{name} has no gradient to compare"
        deviations[name] = ((gathered - expected).norm() / expected.norm()).item()
    worst = max(deviations, key=lambda name: deviations[name])
    state, plain = sharded.state_dict(), whole.state_dict()
    kept = [[name for name in one if ".weight." not in name] for one in (state, plain)]  # without scales of codes
    trained = [name for name, p in whole.named_parameters() if p.requires_grad and name in state]
    for model in (whole, sharded, again):
        model.eval()
    parallelize(again, tp, options=options)
    again.load_state_dict(state)
    with torch.no_grad():
        losses = [model(**batch(97, 9)).loss.item() for model in (whole, sharded, again)]
    result = {
        "losses": found["losses"], "norms": found["norms"], "sent": found["sent"][1],
        "grad": (worst, deviations[worst]),
        "same gradients": set(grads[0]) == set(grads[1]),
        "outputs": (found["outputs"][0] - found["outputs"][1]).abs().max().item(),
        "weight": max((state[name] - plain[name]).abs().max().item() for name in trained),
        "same state": kept[0] == kept[1] and all(state[name].shape == plain[name].shape for name in kept[1]),
        "evaluated": losses, "reloaded": None, "merged": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        engine._save_pretrained(unpatched(peft.PeftModel.save_pretrained), sharded, folder)
        if torch.distributed.get_rank() == 0:
            torch.manual_seed(0)
            plainly = peft.PeftModel.from_pretrained(base(), folder).eval()
            with torch.no_grad():
                result["reloaded"] = abs(plainly(**batch(97, 9)).loss.item() / losses[1] - 1)
    if merges:
        result["merged"] = _merged(engine, whole, sharded, losses[0])
    return result


def _merged(engine: Any, whole: Any, sharded: Any, expected: float) -> tuple[list[float], bool, float]:
    """Losses with merged adapters (relative), whether names are PEFT's, and how far the merged weights are off."""
    tuner = type(whole.base_model)
    losses = []
    for change in ("merge_adapter", "unmerge_adapter"):
        engine._merge(unpatched(getattr(tuner, change)), sharded.base_model)
        with torch.no_grad():
            losses.append(sharded(**batch(97, 9)).loss.item())
    unload = unpatched(tuner._unload_and_optionally_merge)
    merged = [engine._unload(unload, model.base_model) for model in (whole, sharded)]
    states = [model.state_dict() for model in merged]
    with torch.no_grad():
        losses.append(merged[1](**batch(97, 9)).loss.item())
    off = max((states[1][name] - value).abs().max().item() for name, value in states[0].items())
    return [abs(loss / expected - 1) for loss in losses], list(states[0]) == list(states[1]), off


def check(results: list[dict[str, Any]], weights: float = 3e-4) -> None:
    for found in results:
        assert found["same gradients"] and found["same state"]
        assert found["losses"][STEPS:] == pytest.approx(found["losses"][:STEPS], rel=1e-5)
        assert found["norms"][STEPS:] == pytest.approx(found["norms"][:STEPS], rel=1e-5)
        assert found["grad"][1] <= 1e-4, found["grad"]
        assert found["outputs"] <= 1e-4
        assert found["weight"] <= weights
        assert found["evaluated"] == pytest.approx([found["evaluated"][0]] * 3, rel=1e-5)
        assert found["reloaded"] is None or found["reloaded"] <= 1e-5
        if found["merged"] is not None:
            losses, names, off = found["merged"]
            assert names and max(losses) <= 1e-4 and off <= 3e-4
