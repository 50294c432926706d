"""What a run will do, printed once by the world's first rank when its model is sharded (``report: off`` leaves it out).

Where ranks are they said when they started, in the key-value store: no collective, no wait, nothing on a device.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from tp_plugin.mesh.hosts import places_of_ranks
from tp_plugin.policy import Plan, policy_for
from tp_plugin.runtime.first_step import FirstStep, size
from tp_plugin.runtime.runtime import Runtime

WIDTH = 110


def announce(runtime: Runtime, engine: str, zero_stage: int = 0) -> None:
    """Print the report, and have the first optimizer step (and the third one's memory) measured; once for a Runtime.

    Called by every rank.

    Args:
        engine: what does data parallelism, in words.
        zero_stage: DeepSpeed's, where that does it.
    """
    states = [(state, model) for state in runtime.models if (model := state.model()) is not None]
    if runtime.reported or not states:
        return
    runtime.reported = True
    runtime.crash_report.memory_advice = functools.partial(_advice, runtime, zero_stage)
    if runtime.config.report_memory:
        from tp_plugin.engines.memory_report import MemoryReport

        runtime.progress.memory_report = MemoryReport(runtime)
    if not runtime.config.report:
        return
    mesh = runtime.mesh
    runtime.progress.first_step = FirstStep(mesh, say=mesh.rank == 0)
    if mesh.rank == 0:
        states.sort(key=lambda found: found[0].number)
        state, model = states[0]
        lines = report(model, state.plan, runtime, engine, places_of_ranks(mesh.world.size))
        if len(states) > 1:
            lines["also sharded"] = ", ".join(type(model).__name__ for _, model in states[1:])
        _print(lines)


def _advice(runtime: Runtime, zero_stage: int) -> str:
    from tp_plugin.engines.memory_advice import advice  # builds a model, which no run needs that goes well

    return advice(runtime, zero_stage)


def report(
    model: nn.Module, plan: Plan, runtime: Runtime, engine: str, places: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """The report's lines: what about → what. ``places``: each rank's machine and device."""
    mesh, options = runtime.mesh, runtime.config.as_written().options
    parameters = dict(model.named_parameters())
    up, down = plan.reductions()
    stages = f" pp {mesh.unit.size // mesh.tp_size} ×" if mesh.unit.size > mesh.tp_size else ""
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    width = f" of {hidden} numbers a token" if hidden else ""
    traffic = []
    if mesh.tp_size > 1:
        traffic += [f"{up} + {down} all-reduces (forward + backward){width}"]
        traffic += [f"{len(plan.heads)} all-gather of 3 numbers a token for the loss"] if plan.heads else []
        traffic += ["1 sum of gradients that ranks have parts of"] if plan.gradient_sums() else []
    if stages:
        traffic += [f"the hidden state to the next stage and its gradient back{width}"]
    lines = {
        "model": f"{type(model).__name__}, policy {_policy(model, plan, options)}",
        "ranks": f"tp {mesh.tp_size} ×{stages} dp {mesh.dp_size} = {mesh.world.size}; {engine}",
        "where": where(places, mesh.unit.size),
        **_sizes(parameters, plan),
        "per micro-batch": ", ".join(traffic),
        "options": ", ".join(f"{key}: {value}" for key, value in dict(options or {}).items()) or "defaults",
    }
    return lines


def _policy(model: nn.Module, plan: Plan, options: Any) -> str:
    if plan.unproven:
        return "derived from transformers' plan, proven by no test: `tp-plugin verify` proves it"
    if options and "policy" in options:
        return str(options["policy"])
    origin = policy_for(getattr(model, "config", type(model).__name__)).origin
    return "registered" if origin == "registered" else "derived from transformers' plan, proven"


def _sizes(parameters: dict[str, nn.Parameter], plan: Plan) -> dict[str, str]:
    """Of the whole model, and of the rank that holds most of it, by part."""
    vocabulary = {f"{path}.weight" for path in (*plan.embeddings, *plan.heads)}
    parts = {"blocks": [0] * plan.tp, "vocabulary": [0] * plan.tp, "replicated": [0] * plan.tp}
    whole, replicated = 0, 0
    for name, parameter in parameters.items():
        layout = plan.layouts[name]
        whole += math.prod(layout.features.shape)
        part = "vocabulary" if name in vocabulary else "blocks" if layout.is_sharded else "replicated"
        replicated += part == "replicated"
        for rank in range(plan.tp):
            parts[part][rank] += layout.local_numel(rank) * parameter.element_size()
    held = [sum(of_rank) for of_rank in zip(*parts.values(), strict=True)]
    most = held.index(max(held))
    numel = sum(plan.layouts[name].local_numel(most) for name in parameters)
    return {
        "parameters": f"{_count(whole)}; a rank holds {_count(numel)} ({size(held[most])}): "
        + ", ".join(f"{part} {size(of_rank[most])}" for part, of_rank in parts.items()),
        "replicated": f"{replicated} of {len(parameters)} tensors, {size(parts['replicated'][most])} on every rank",
    }


def where(places: Iterable[tuple[str, str]], unit: int) -> str:
    """``ranks 0–3 on a (cuda:0–3), ranks 4–7 on b (cuda:0–3)``, at most four machines by name."""
    found, first = [], 0
    for machine, of_machine in groupby(places, key=lambda place: place[0]):
        devices = [device for _, device in of_machine]
        last = first + len(devices) - 1
        ends = devices[0] if devices[0] == devices[-1] else f"{devices[0]} to {devices[-1]}"
        found.append(f"ranks {first}–{last} on {machine} ({ends})")
        first = last + 1
    hidden = [f"… {len(found) - 4} more machines"] if len(found) > 4 else []
    return ", ".join(found[:4] + hidden) + f"; each {unit} in a row hold one model"


def _count(numel: int) -> str:
    return f"{numel / 1e9:.2f} B" if numel >= 1e9 else f"{numel / 1e6:.2f} M" if numel >= 1e6 else f"{numel:,}"


def _print(lines: dict[str, str]) -> None:
    state = random.getstate()  # rich draws from it when it is imported, and so would have the script's next number
    from rich.console import Console
    from rich.table import Table

    random.setstate(state)
    table = Table(show_header=False, box=None, padding=(0, 1), title="tp_plugin", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for about, what in lines.items():
        table.add_row(about, what)
    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
