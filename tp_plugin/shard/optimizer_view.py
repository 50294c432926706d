"""``optimizer.state[p]`` looks whole to the script: moments are tensors of the shape of a parameter's shard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.param_entry import entry_of


def show_states(optimizer: torch.optim.Optimizer, region: ScriptRegion) -> None:
    """Let the state tensors of sharded parameters look whole in ``region``; costs nothing once they do."""
    if _shown(optimizer):
        return
    for parameter, state in optimizer.state.items():
        entry = entry_of(parameter) if isinstance(parameter, torch.Tensor) else None
        if entry is None or entry.seen is None:
            continue
        for key, value in state.items():
            if _is_moment(value, parameter) and (entry.layout.is_sharded or is_split(value)):
                region.add(value, replace(entry.seen, name=f"{entry.name}: {key}", applied=None, summed=False))


def _shown(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the last parameter's states were shown: optimizers make and replace them all at once."""
    for parameter, state in reversed(optimizer.state.items()):
        if getattr(parameter, "tensor_model_parallel", False):
            moments = [value for value in state.values() if _is_moment(value, parameter)]
            if moments:
                return all(hasattr(value, "tp_global") for value in moments)
    return True


def _is_moment(value: Any, parameter: Any) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        is_alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return is_alike and value.dtype is not torch.uint8  # codes mean nothing without their scales
