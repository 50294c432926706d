"""Optimizers that look at full matrices: they step one full parameter at a time, on every rank of the TP group alike.

Their states are then those of full parameters, which for Adafactor are two vectors. Parameter and gradient are
gathered for the step (twice the sharded parameters' bytes over the TP group), one parameter at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch

from tp_plugin.mesh.groups import Group
from tp_plugin.shard.full_tensor import gather_shards
from tp_plugin.tensor.param_entry import layout_of

KNOWN = {("torch", "Adafactor"), ("torch", "Muon"), ("transformers", "Adafactor")}
"""Package and class; each parameter's update needs that parameter alone."""


def needs_full_matrices(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` needs full parameters and can be given them."""
    return (type(optimizer).__module__.partition(".")[0], type(optimizer).__name__) in KNOWN


def install(optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Replace the instance's ``step``, which then gathers over ``group``, the TP group."""
    raw: Any = type(optimizer).step
    while getattr(raw, "hooked", False):  # the script's step hooks run once per step, not per parameter
        raw = raw.__wrapped__

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for settings in groups:
                for parameter in settings["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**settings, "params": [parameter]}]
                        with _full(parameter, group):
                            raw(self)
        finally:
            self.param_groups = groups
        return loss

    optimizer.step = MethodType(type(optimizer).profile_hook_step(step), optimizer)  # type: ignore[method-assign]


@contextlib.contextmanager
def _full(parameter: torch.nn.Parameter, group: Group) -> Iterator[None]:
    layout = layout_of(parameter)
    if layout is None or not layout.is_sharded:
        yield
        return
    local, grad = parameter.data, parameter.grad
    assert grad is not None
    parameter.grad = None
    parameter.data = gather_shards(local, layout, group)
    parameter.grad = gather_shards(grad, layout, group)
    try:
        yield
    finally:
        full, parameter.grad = parameter.data, None
        parameter.data = local
        parameter.grad = grad
    with torch.no_grad():
        parameter.copy_(layout.shard(full, group.rank))
