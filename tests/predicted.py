"""What the plan says of a run that measured.py measures."""

from __future__ import annotations

import functools
from typing import Any

import torch
from measured import BUCKET
from models import config_for

from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.estimate import memory as memories
from tp_plugin.estimate.states import held_parameters, states
from tp_plugin.estimate.trace import cut, find_layers, trace
from tp_plugin.policy import make_plan, policy_for


@functools.cache
def _traced(tp: int, model_type: str, given: tuple[tuple[str, Any], ...], size: int, length: int, adapter: str, options: tuple[tuple[str, bool], ...]) -> Any:
    settings = config_for(model_type, **dict(given))
    model: Any = build(settings, meta=True)
    root = model
    if adapter:
        import peft

        with torch.device("meta"):
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", lora_alpha=16))
        root = model.base_model.model
    policy, run = policy_for(settings), RunConfig(tp, **dict(options))
    plan = make_plan(root, policy, tp)
    stacks_of = find_layers(root, plan)
    ids = torch.zeros(size, length, dtype=torch.long, device="meta")
    held = held_parameters(root, plan, [layers.path for layers in stacks_of])
    return held, trace(cut(root, stacks_of), policy, stacks_of, {"input_ids": ids, "labels": ids}, tp, run)


def predicted(
    tp: int, dp: int, engine: str, model_type: str, overrides: dict[str, Any], size: int, length: int,
    checkpointing: bool = False, adapter: str = "", **options: bool,
) -> dict[str, float]:  # fmt: skip
    """The same figures."""
    held, step = _traced(tp, model_type, tuple(overrides.items()), size, length, adapter, tuple(options.items()))
    step = memories.checkpointed(step) if checkpointing else step
    fixed = states(held, engine, dp, "adamw", False, BUCKET)
    grow = engine == "ddp"
    kept, peak = memories.activations(step, 1, grow=grow)
    found = {"weights": fixed.weights, "gradients": fixed.gradients, "optimizer": fixed.optimizer, "activations": kept, "peak": peak}
    return found
