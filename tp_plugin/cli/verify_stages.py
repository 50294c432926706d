"""What ``tp-plugin verify --pp`` says of the pipeline stages of a model, from its shapes alone."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from torch import nn

from tp_plugin.policy import Plan
from tp_plugin.policy.stages import Stages
from tp_plugin.shard.apply import unit_layout


def table(model: nn.Module, plan: Plan, stages: Stages) -> Table:
    """A row for each stage: its layers, what it runs besides, and what a rank of it holds."""
    shown = Table("stage", "layers", "besides", "parameters of a rank", "of the model")
    whole = sum(parameter.numel() for parameter in model.parameters())
    for stage, row in enumerate(as_data(model, plan, stages)):
        first, last = row["layers"]
        numel = max(row["numel_of_rank"])
        layers = f"{first}–{last}" if last > first else f"{first}"
        shown.add_row(str(stage), layers, ", ".join(row["besides"]) or "-", f"{numel:,}", f"{numel / whole:.1%}")
    return shown


def as_data(model: nn.Module, plan: Plan, stages: Stages) -> list[dict[str, Any]]:
    """The same for programs: numbers of the first and the last layer, module paths, elements of each TP rank."""
    layouts = {name: unit_layout(plan, stages, name) for name, _ in model.named_parameters()}
    found = []
    for stage in range(stages.count):
        own = stages.layers(stage)
        besides = (*(stages.before if stage == 0 else ()), *(stages.after if stage == stages.count - 1 else ()))
        ranks = range(stage * plan.tp, (stage + 1) * plan.tp)
        numel = [sum(math.prod(layout.local_shape(rank)) for layout in layouts.values()) for rank in ranks]
        found.append({"layers": [own[0], own[-1]], "besides": list(besides), "numel_of_rank": numel})
    return found


def traffic(config: Any, stages: Stages) -> str:
    """What travels between stages, in a sentence."""
    hidden = getattr(config.get_text_config(), "hidden_size", None)
    size = f" ({hidden} numbers a token)" if hidden else ""
    tied = sorted(name for name, on in stages.parameters.items() if len(on) > 1)
    sums = f" The gradient of {tied[0]}, which is tied, is summed over both ends once a step." if tied else ""
    return (
        f"Between neighbouring stages, for each micro-batch: the hidden state{size} forward and its gradient back; "
        f"from the last stage, the loss.{sums}"
    )
