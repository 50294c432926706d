"""``state_dict`` of a sharded model is the full model's, and ``load_state_dict`` takes a full model's.

The hooks sit on the modules that own sharded parameters, so every way into the weights (``state_dict`` of the model or
a part, ``save_pretrained``, Accelerate's ``save_model`` and ``save_state``) passes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard import quantized
from tp_plugin.shard.full_tensor import gather_full_tensor
from tp_plugin.shard.model_state import ModelState
from tp_plugin.shard.params import plain_name
from tp_plugin.shard.state_form import StateForm, form
from tp_plugin.tensor.global_view import as_global, info_of, is_global, local_of


class StateDictHooks:
    """Hooks of the whole model: around all of its tensors."""

    def __init__(self, state: ModelState):
        self.state = state

    def before(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """State-dict pre-hook: other ranks may read from here on."""
        self.state.check()
        if form() is StateForm.FULL:  # lazy ones are read within the caller's session
            self.state.runtime.sessions.enter(self.state.uid)

    def after(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """State-dict hook: what FSDP2 has split is gathered by all ranks."""
        if form() is StateForm.LOCAL:
            return
        split = [key for key, value in state.items() if isinstance(value, torch.Tensor) and is_split(value)]
        if split:  # no rank can read alone what another data-parallel rank holds
            self.state.runtime.sync_points.rendezvous(BARRIER)
        for key, value in state.items():
            state[key] = local_of(value)
        for key in split:
            layout = self.state.index.layouts.get(plain_name(key.removeprefix(prefix)))
            full = gather_full_tensor(state[key], layout, self.state.mesh)
            state[key] = self.state.copies.give(key.removeprefix(prefix), full)
        if form() is StateForm.FULL:
            self.state.runtime.sessions.leave(self.state.uid)


class ModuleStateHooks:
    """Hooks of one module that owns sharded parameters.

    Attributes:
        path: where the module stands in its model; follows it when PEFT moves modules.
    """

    def __init__(self, state: ModelState, path: str):
        self.state, self.path = state, path

    def give(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """State-dict hook: full tensors in place of this rank's."""
        if form() is StateForm.LOCAL:
            return
        give = self.state.lazy_full_tensor if form() is StateForm.LAZY else self.state.full_tensor
        rank = self.state.mesh.unit.rank
        for name, _ in module.named_parameters(recurse=False):
            value, key = local_of(state.get(prefix + name)), join(self.path, name)
            # another shape than this rank's shard is a placeholder: ZeRO-3 keeps the data elsewhere
            if (
                value is None
                or is_split(value)
                or tuple(value.shape) != self.state.index.layouts[key].local_shape(rank)
            ):
                continue
            with torch.no_grad():
                state[prefix + name] = give(key, value)
        with torch.no_grad():
            quantized.give_whole(module, state, prefix, lambda name, part: give(join(self.path, name), part))

    def take(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *problems: list[str]
    ) -> None:
        """Load-state-dict pre-hook: this rank's shards in place of full tensors."""
        self.state.copies.forget()
        quantized.take_whole(module, state, prefix, self.state.mesh.unit.rank)
        for name, parameter in module.named_parameters(recurse=False):
            value = state.get(prefix + name)
            layout = self.state.index.layouts[join(self.path, name)]
            # a tensor that already has the local shape is this rank's own (a peer's state_dict); others are sliced
            if not isinstance(value, torch.Tensor) or is_split(value) or is_global(value):
                continue
            if (seen := info_of(parameter)) is not None:  # it takes what is whole
                if tuple(value.shape) != layout.shape and tuple(value.shape) == seen.local_shape:
                    state[prefix + name] = as_global(value.detach(), seen)
                continue
            if layout.is_sharded and tuple(value.shape) == layout.shape:
                state[prefix + name] = layout.shard(value, self.state.mesh.unit.rank)


def join(path: str, name: str) -> str:
    """The name in the model of parameter ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name
