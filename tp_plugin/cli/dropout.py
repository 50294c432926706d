"""The proof with dropout on: each dropout of the config by itself, and then all of them.

A mask is the one that a single process draws from the same seed, unless the run has ``dropout: sharded``, or nobody
knows how a tensor is split: there each rank draws for its own heads or features. With all of them on and generators
unequal, ranks must remain one model: outputs, losses and replicas bit by bit equal, step after step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import tp_plugin
from tp_plugin.cli.local_ranks import on_first_rank
from tp_plugin.cli.models import build
from tp_plugin.cli.parity_result import LIMITS, DropoutResult
from tp_plugin.cli.random_batch import loss_of
from tp_plugin.errors import DivergenceError
from tp_plugin.policy import Policy
from tp_plugin.runtime.runtime import require
from tp_plugin.shard.audit import audit
from tp_plugin.shard.model_state import checksum

PROBABILITY = 0.25
SEED = 5
STEPS, MICRO = 3, 2


def dropouts(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all dropout probabilities in a config and the configs inside it; layerdrop is none."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from dropouts(value, f"{prefix}{name}.")
        elif _is_probability(name) and isinstance(value, int | float) and not _is_integer(config, name, value):
            yield prefix + name


def _is_probability(name: str) -> bool:
    return ("drop" in name or name.endswith("pdrop")) and "layerdrop" not in name and "path" not in name


def _is_integer(config: Any, name: str, value: float) -> bool:
    # MPT's config declares a probability of attention as an integer, and refuses others
    return isinstance(value, bool) or type(config).__annotations__.get(name) in (int, "int")


def with_dropouts(config: Any, names: list[str]) -> Any:
    """A copy of ``config`` with these dropouts on and all others off."""
    changed = copy.deepcopy(config)
    for name in dropouts(changed):
        *owners, last = name.split(".")
        owner = changed
        for inner in owners:
            owner = getattr(owner, inner)
        setattr(owner, last, PROBABILITY if name in names else 0.0)
    return changed


def prove_dropout(config: Any, policy: Policy, tp: int) -> DropoutResult:
    """Run on every rank of an initialised world of ``tp``."""
    found = DropoutResult()
    names = list(dropouts(config))
    if not names:
        return found
    # the mesh comes with the first sharded model
    sharded = _sharded(with_dropouts(config, names[:1]), policy, tp)
    drawn = on_first_rank(
        require().mesh,
        lambda: [_draws(build(with_dropouts(config, on), meta=False)) for on in ([], *([name] for name in names))],
    )
    quiet = drawn[0][1]  # routers may draw, too
    for name, expected in zip(names, drawn[1:], strict=True):
        if sharded is None:
            sharded = _sharded(with_dropouts(config, [name]), policy, tp)
        _check_one(name, quiet, expected, _draws(sharded), found)
        sharded = None
    used = [*found.equal, *found.own]
    if used:
        _check_together(with_dropouts(config, used), policy, tp, found)
    return found


def _sharded(config: Any, policy: Policy, tp: int) -> nn.Module:
    model = tp_plugin.parallelize(build(config, meta=False), tp_size=tp, policy=policy)
    require().progress.looks_for_drift = False
    return model


def _draws(model: nn.Module) -> tuple[float, torch.Tensor]:
    """The loss of a training forward, and the generator's state after it."""
    return loss_of(model.train(), 0, draws=SEED).item(), torch.get_rng_state()


def _check_one(
    name: str,
    quiet: torch.Tensor,
    expected: tuple[float, torch.Tensor],
    own: tuple[float, torch.Tensor],
    found: DropoutResult,
) -> None:
    """Whether a single dropout draws what one process draws; a name that draws nothing is left out."""
    if torch.equal(expected[1], quiet):
        return
    if not torch.equal(expected[1], own[1]):
        found.own.append(name)
        return
    found.equal.append(name)
    apart = abs(own[0] - expected[0]) / abs(expected[0])
    if not apart <= LIMITS["loss"]:
        found.faults.append(f"with {name} on, the loss deviates by {apart:.1e} though its masks are one process'")


def _check_together(config: Any, policy: Policy, tp: int, found: DropoutResult) -> None:
    """Train with all on, generators unequal before each forward; ranks must stay one model."""
    mesh = require().mesh
    model = _sharded(config, policy, tp).train()
    plan, record = model.tp_record.plan, model.tp_record  # type: ignore[union-attr]
    seen: dict[str, int] = {}

    def recorder(path: str) -> Any:
        def record_output(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor):
                # a sum: a set of layer types, for each of which a model calls its rotary embedding, has no order
                seen[path or "(the model)"] = seen.get(path or "(the model)", 0) + checksum(first)

        return record_output

    inside = tuple(f"{path}." for path in plan.blocks)
    for path, module in model.named_modules():
        if not path.startswith(inside):
            module.register_forward_hook(recorder(path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses = []
    for step in range(STEPS):
        for micro in range(MICRO):
            batch = 10 * step + micro
            loss = loss_of(model, batch, draws=batch + 100 * mesh.tp.rank) / MICRO
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if not all(math.isfinite(loss) for loss in losses):
        found.faults.append(f"with dropout on, losses are {losses}")
    everyone = mesh.unit_cpu.gather_objects((seen, losses))
    apart = [path for path in seen if len({outputs[path] for outputs, _ in everyone}) > 1]
    if apart:
        found.faults.append(f"with dropout on, ranks compute different outputs of {apart[0]}")
    if any(other != losses for _, other in everyone):
        found.faults.append("with dropout on, ranks see different losses")
    try:
        audit(record, 0.0, repair=False)
    except DivergenceError as error:
        found.faults.append(str(error))
