"""The proof of a policy: the sharded model trained beside the whole one, on local gloo ranks.

The first rank trains both. Compared are: outputs of all modules that are whole on every rank, losses, every gradient,
the gradient norm, weights after clipped AdamW steps, greedy generation, the checkpoint as plain transformers
reloads it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.cli.local_ranks import on_first_rank
from tp_plugin.cli.models import build
from tp_plugin.cli.observed_run import clip_whole, generated, outputs, train
from tp_plugin.cli.parity_result import LIMITS, Result
from tp_plugin.cli.policy_hints import hint_for_block, hint_for_gradient
from tp_plugin.cli.random_batch import loss_of
from tp_plugin.policy import Plan, Policy
from tp_plugin.runtime.runtime import require
from tp_plugin.tensor.global_view import local_of

STEPS = 3


def compare(config: Any, policy: Policy, tp: int, steps: int = STEPS, pp: int = 1) -> Result:
    """Run on every rank of an initialised world of ``tp`` × ``pp``: the sharded model against the whole one.

    The first rank has the whole one. Every rank compares what it holds with its share of the whole model's, so that
    replicas that drift are seen, too.
    """
    import tp_plugin

    sharded = build(config, meta=False)
    whole = copy.deepcopy(sharded) if torch.distributed.get_rank() == 0 else nn.Module()
    tp_plugin.parallelize(sharded, tp_size=tp, policy=policy, pp_size=pp)
    require().progress.looks_for_drift = False
    mesh, plan = require().mesh, sharded.tp_record.plan  # type: ignore[union-attr]
    result = Result()

    expected = on_first_rank(mesh, lambda: _reference(whole, plan, steps, pp))
    _compare_outputs(sharded, plan, expected, result)
    ledger = mesh.context.stats.total
    ledger.clear()
    loss_of(sharded, 0).backward()
    result.collectives, result.sent = dict(ledger.count), dict(ledger.bytes)
    sharded.zero_grad()

    found = train(sharded, steps, torch.nn.utils.clip_grad_norm_)
    result.norms, result.moved = found["norms"], expected["moved"]
    for step, (a, b) in enumerate(zip(expected["losses"], found["losses"], strict=True)):
        result.note("loss", abs(a - b) / abs(a), f"forward {step}")
    for step, (a, b) in enumerate(zip(expected["norms"], found["norms"], strict=True)):
        result.note("norm", abs(a - b) / a, f"step {step}")
    _compare_shares(sharded, plan, expected, found["grads"], result)

    if any(mesh.unit_cpu.gather_objects(bool(result.failures()))):
        return result  # replicas have drifted apart; saving and generating would be refused for that
    result.where["state"] = _fault_of_checkpoint(sharded, whole)
    result.state = not result.where["state"]
    if expected["tokens"] is not None:
        result.generation = generated(sharded) == expected["tokens"]
    return result


def _reference(whole: nn.Module, plan: Plan, steps: int, pp: int) -> dict[str, Any]:
    """All that the sharded model is compared with; ``whole`` is trained on the way."""
    order: list[str] = []
    seen_outputs = outputs(whole, plan, order, stages=pp)
    start = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    seen = train(whole, steps, clip_whole)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    moved = max((weights[name] - start[name]).abs().max().item() for name in weights)
    tokens = generated(whole) if whole.can_generate() and hasattr(whole, "generate") else None  # type: ignore[operator]
    return {**seen, "order": order, "outputs": seen_outputs, "weights": weights, "moved": moved, "tokens": tokens}


def _compare_shares(
    sharded: nn.Module, plan: Plan, expected: dict[str, Any], grads: dict[str, torch.Tensor], result: Result
) -> None:
    """Gradients and weights of this rank against its shares of the whole model's; deviations are those of all ranks."""
    mesh, layouts = require().mesh, sharded.tp_record.index.layouts  # type: ignore[union-attr]
    rank = mesh.unit.rank
    apart: dict[str, tuple[float, float]] = {}
    for name, weight in expected["weights"].items():
        layout, grad = layouts[name], expected["grads"].get(name)
        far = 0.0
        if grad is not None:
            share = layout.shard(grad, rank)
            far = ((local_of(grads[name]) - share) if name in grads else share).norm().item()
        elif name in grads:
            far = float("inf")
        local = local_of(sharded.get_parameter(name)).detach()
        apart[name] = far, (local - layout.shard(weight, rank)).abs().max().item() if local.numel() else 0.0
    everyone = mesh.unit_cpu.gather_objects(apart)
    size = torch.stack([grad.norm() for grad in expected["grads"].values()]).norm().item()
    wrong = []
    for name in expected["weights"]:
        layout, grad = layouts[name], expected["grads"].get(name)
        result.note("weight", max(theirs[name][1] for theirs in everyone), name)
        far = [theirs[name][0] for theirs in everyone]
        if grad is None:
            if max(far):
                result.note("gradient", float("inf"), f"{name}, which has none in the whole model")
            continue
        # a gradient that is zero but for rounding noise (a key's bias: softmax ignores it) must stay noise
        scale = grad.norm().item() if grad.norm() > 1e-6 * size else 1e-2 * size
        deviation = (math.hypot(*far) if layout.is_sharded else max(far, key=_nan_is_worst)) / scale
        result.note("gradient", deviation, name)
        if not deviation <= LIMITS["gradient"]:
            wrong.append(name)
    if wrong and not result.hints.get("output"):
        order = expected["order"]
        last = {path: at for at, path in enumerate(order)}
        first = max(wrong, key=lambda name: last.get(name.rpartition(".")[0], -1))
        hint = hint_for_gradient(first, plan, order)
        result.hints["gradient"] = f"the backward goes wrong first at {first}" + (f": {hint}" if hint else "")


def _nan_is_worst(number: float) -> float:
    return float("inf") if math.isnan(number) else number


def _fault_of_checkpoint(sharded: nn.Module, whole: nn.Module) -> str:
    """What is wrong with the checkpoint that the main process writes, as plain transformers reloads it; or nothing."""
    mesh, record = require().mesh, sharded.tp_record
    fault = ""
    with record.runtime.sessions.together("proof"):  # type: ignore[union-attr,operator]
        if mesh.is_leader:
            saved, plain = sharded.state_dict(), whole.state_dict()
            remade = getattr(whole, "_keys_to_ignore_on_save", None) or ()  # sinusoids, which no checkpoint has
            with tempfile.TemporaryDirectory() as folder, _quiet():
                sharded.save_pretrained(folder, state_dict=dict(saved))  # type: ignore[operator]  # it is emptied
                reloaded = type(whole).from_pretrained(folder).state_dict()  # type: ignore[attr-defined]
            for state, what, left_out in ((saved, "state_dict", ()), (reloaded, "the reloaded checkpoint", remade)):
                if state.keys() != plain.keys():
                    fault = f"{what} has other keys: {sorted(state.keys() ^ plain.keys())}"
                else:
                    far = {key: (state[key].float() - plain[key].float()).abs() for key in plain if key not in left_out}
                    wrong = [key for key, apart in far.items() if apart.numel() and not apart.max() <= LIMITS["weight"]]
                    fault = f"{what} deviates in {', '.join(wrong)}" if wrong else ""
                if fault:
                    break
    return str(mesh.unit_cpu.broadcast_object(fault))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _compare_outputs(sharded: nn.Module, plan: Plan, expected: dict[str, Any], result: Result) -> None:
    """Note the largest deviation, or the first that is beyond the limit."""
    mesh = require().mesh
    rank = mesh.tp.rank
    found = outputs(sharded, plan, stages=mesh.pp_size)
    for path, tensor in expected["outputs"].items():
        where = f"module {path or '(the model)'}"
        if path not in found or found[path].shape != tensor.shape:
            result.output, result.where["output"] = float("inf"), f"{where}: another shape"
            result.hints["output"] = hint_for_block(sharded, plan, path, rank)
            return
        apart = ((found[path] - tensor).norm() / tensor.norm().clamp_min(1e-12)).item()
        if not apart <= LIMITS["output"]:
            result.output, result.where["output"] = apart, where
            result.hints["output"] = hint_for_block(sharded, plan, path, rank)
            return
        result.output = max(result.output, apart)
