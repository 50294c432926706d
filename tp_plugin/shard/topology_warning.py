"""The warning about a TP group that spans machines, before it trains: what it sends, and what to write instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch import nn

from tp_plugin.mesh.hosts import Machine, comes_first
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import Plan

EXAMPLE = 8 * 1024
"""Tokens of the micro-batch that the warning takes as an example."""


def bytes_per_token(model: nn.Module, plan: Plan) -> int:
    """What the all-reduces of activations move per token of a micro-batch, forward and backward, if all have its width.

    In the dtype of the parameters; autocast sends less.
    """
    shapes = [plan.layouts[f"{row}.weight"].features for row in plan.rows]
    widths = [shape.shape[1 - shape.dim] for shape in shapes if len(shape.shape) == 2 and shape.dim is not None]
    size = next((p.element_size() for p in model.parameters()), 0)
    return sum(plan.reductions()) * max(widths, default=0) * size


def warn_of_topology(model: nn.Module, plan: Plan, mesh: Mesh, machines: Sequence[Machine]) -> None:
    """Print, once for the world, that this TP group spans machines.

    Args:
        machines: where its ranks are, in rank order.
    """
    places: dict[Machine, list[int]] = {}
    for rank, machine in zip(mesh.tp.ranks, machines[mesh.pp.rank * mesh.tp_size :], strict=False):
        places.setdefault(machine, []).append(rank)
    if len(places) == 1 or not mesh.is_leader or not comes_first("a TP group spans machines"):
        return
    where = ", ".join(f"ranks {ranks} on {machine.name}" for machine, ranks in places.items())
    size = bytes_per_token(model, plan)
    up, down = plan.reductions()
    share = 2 * (mesh.tp_size - 1) / mesh.tp_size
    print(
        f"tp_plugin: warning: a TP group spans machines ({where}), so each step of {type(model).__name__} waits for "
        f"the network {up} times in the forward and {down} times in the backward of every micro-batch. These "
        f"all-reduces take {size:,} bytes a token: for {EXAMPLE:,} tokens {size * EXAMPLE / 2**20:,.0f} MiB, of which "
        f"each rank sends {share:.3g} times as much in a ring. {_instead(mesh.tp_size)}",
        file=sys.stderr,
        flush=True,
    )


def _instead(tp_size: int) -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    sizes = [size for size in range(2, min(local, tp_size) + 1) if local % size == 0]
    if sizes:
        return f"With {local} processes on a machine, tp_size: {sizes[-1]} keeps each group inside one"
    return "To keep each group inside one, let tp_size divide the number of processes on a machine"
