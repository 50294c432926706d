"""What the plan says of a run that measured.py measures."""

from __future__ import annotations

import functools
import json
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

CPU_STATE = 5056
"""Bytes of the CPU generator's state, of which a checkpoint keeps one."""


@functools.cache
def _traced(
    tp: int, model_type: str, given: str, size: int, length: int, checkpointing: bool, adapter: str, given_options: str
) -> Any:
    settings = config_for(model_type, **json.loads(given))
    root: Any = build(settings, meta=True)
    if adapter:
        import peft

        with torch.device("meta"):
            lora = peft.LoraConfig(target_modules="all-linear", lora_alpha=16)
            root = peft.get_peft_model(root, lora).base_model.model  # type: ignore[union-attr]
    policy, run = policy_for(settings), RunConfig(tp, **json.loads(given_options))
    plan = make_plan(root, policy, tp)
    stacks_of = find_layers(root, plan)
    ids = torch.zeros(size, length, dtype=torch.long, device="meta")
    held = held_parameters(root, plan, [layers.path for layers in stacks_of])
    batch = {"input_ids": ids, "labels": ids}
    traced = checkpointing and bool(adapter)
    step = trace(cut(root, stacks_of), policy, stacks_of, batch, tp, run, traced)
    if checkpointing and not traced:
        step = memories.checkpointed(step)
    return held, step


def predicted(
    tp: int, dp: int, engine: str, model_type: str, overrides: dict[str, Any], size: int, length: int,
    checkpointing: bool = False, adapter: str = "", **options: bool,
) -> dict[str, float]:  # fmt: skip
    """The same figures."""
    held, step = _traced(
        tp, model_type, json.dumps(overrides), size, length, checkpointing, adapter, json.dumps(options)
    )
    engine = "ddp" if engine == "none" else engine
    fixed = states(held, engine, dp, "adamw", False, BUCKET)
    kept, peak = memories.activations(step, 1, grow=engine == "ddp")
    if checkpointing:
        states_of_random = CPU_STATE * sum(bool(path) for (path, _), _ in step.forward)
        kept, peak = kept + states_of_random, peak + states_of_random
    if engine == "fsdp2" and dp > 1:  # what stays gathered for the backward: what is behind the layers
        kept += sum(p.numel * p.size for p in held if p.places[-1] == ("", 1))
    return {
        "weights": fixed.weights, "gradients": fixed.gradients, "optimizer": fixed.optimizer, "activations": kept,
        "peak": peak,
    }  # fmt: skip
