"""``torch.func.functional_call`` with weights that look whole, or are: the module computes with this rank's shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_plugin.engines.patching import wrap
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current


def install() -> None:
    """Patch ``torch.nn.utils.stateless``, which both public names of the function call."""
    wrap(torch.nn.utils.stateless, "_functional_call", _functional_call)


def _functional_call(original: Any, module: nn.Module, given: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = current()
    if runtime is None or not runtime.models:
        return original(module, given, *args, **kwargs)
    from tp_plugin.shard.params import plain_name
    from tp_plugin.tensor.param_entry import entry_of

    entries = {plain_name(name): entry_of(p) for name, p in module.named_parameters(remove_duplicate=False)}
    local = {name: _local(name, value, entries.get(plain_name(name))) for name, value in given.items()}
    with runtime.region.step():
        return original(module, local, *args, **kwargs)


def _local(name: str, value: Any, entry: Any) -> Any:
    """This rank's shard, or all of a replicated weight.

    Raises:
        TPError: the shape is not the parameter's; or gradients would be this rank's part of what is to be whole.
    """
    if entry is None or not isinstance(value, torch.Tensor):
        return value
    from tp_plugin.tensor.global_view import info_of, local_of
    from tp_plugin.tensor.param_entry import bind

    layout, info = entry.layout, info_of(value)
    if tuple(value.shape) != layout.shape:
        raise TPError(
            f"functional_call was given a tensor of shape {tuple(value.shape)} for {name!r}, which has {layout.shape}"
        )
    recorded = value.requires_grad and torch.is_grad_enabled()
    lies_alike = info is not None and info.layout == layout
    if recorded and (entry.replica_sum is not None or (layout.is_sharded and not lies_alike)):
        raise TPError(
            f"functional_call was given a tensor for {name!r} that requires a gradient, of which each rank would "
            "compute the part of its shard; pass detached weights, or train the model's own parameters"
        )
    whole = not layout.is_sharded or lies_alike
    local = local_of(value) if whole else layout.shard(value.detach(), entry.seen.rank)
    bind(local, replace(entry, seen=None))
    return local
