"""``state_dict`` of a sharded model is the whole model's, and ``load_state_dict`` takes a whole model's.

The hooks sit on the modules that own sharded parameters, so every way into the weights (``state_dict`` of the model or
a part, ``save_pretrained``, Accelerate's ``save_model`` and ``save_state``) passes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.mesh.groups import require_mesh
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard.full_tensor import gather_full_tensor, plain_name
from tp_plugin.shard.lazy_full_tensor import promising
from tp_plugin.shard.model_state import ShardRecord

_local = False


@contextlib.contextmanager
def local_states() -> Iterator[None]:
    """Inside, ``state_dict`` of models and optimizers is this rank's own: for checkpoints that all ranks write."""
    global _local
    before, _local = _local, True
    try:
        yield
    finally:
        _local = before


def gives_local() -> bool:
    """Whether ``state_dict`` is this rank's own just now."""
    return _local


def install(record: ShardRecord, model: nn.Module) -> None:
    """Put the hooks on ``model`` and on every module of it that owns a sharded parameter."""
    model.register_state_dict_pre_hook(_enter)
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if any(record.plan.layouts[_join(path, name)].is_sharded for name in names):
            module.tp_owner = Owner(record, path)
            module._register_state_dict_hook(_give_whole)
            module.register_load_state_dict_pre_hook(_take_whole)
    model._register_state_dict_hook(_leave)


def _enter(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    record: ShardRecord = model.tp_record  # type: ignore[assignment]
    if not (_local or promising()):  # promises are kept within the caller's session
        record.exchange.enter(record.uid)


def _leave(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    record: ShardRecord = model.tp_record  # type: ignore[assignment]
    if _local:
        return
    split = [key for key, value in state.items() if isinstance(value, torch.Tensor) and is_split(value)]
    if split:  # by FSDP2: no rank can read alone what another DP rank holds
        record.exchange.sync_points.meet(BARRIER)
    for key in split:
        layout = record.plan.layouts.get(plain_name(key.removeprefix(prefix)))
        state[key] = gather_full_tensor(state[key], layout, record.mesh)
    if not promising():  # promises are kept within the caller's session
        record.exchange.leave(record.uid)


class Owner:
    """Where a module's parameters stand in their model's record."""

    def __init__(self, record: ShardRecord, path: str):
        self.record, self.path = record, path

    def key(self, name: str) -> str:
        """Name in the model of the module's own parameter ``name``."""
        return _join(self.path, name)


def _give_whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    owner: Owner = module.tp_owner  # type: ignore[assignment]
    rank = owner.record.mesh.tp.rank
    for name, _ in module.named_parameters(recurse=False):
        value = state.get(prefix + name)
        # another shape than this rank's share is a placeholder: ZeRO-3 keeps the data elsewhere
        if (
            _local
            or value is None
            or is_split(value)
            or tuple(value.shape) != owner.record.plan.layouts[owner.key(name)].local_shape(rank)
        ):
            continue
        with torch.no_grad():
            give = owner.record.promise if promising() else owner.record.whole
            state[prefix + name] = give(owner.key(name), value)


def _take_whole(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *problems: list[str]
) -> None:
    owner: Owner = module.tp_owner  # type: ignore[assignment]
    for name, _ in module.named_parameters(recurse=False):
        value = state.get(prefix + name)
        layout = owner.record.plan.layouts[owner.key(name)]
        # a tensor that already has the local shape is this rank's own (a peer's state_dict); others are sliced
        if not isinstance(value, torch.Tensor) or is_split(value):
            continue
        if layout.is_sharded and tuple(value.shape) == layout.shape:
            state[prefix + name] = layout.shard(value, require_mesh().tp.rank)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
