"""PEFT: an adapter is saved by one rank of each TP group."""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.parallel.mesh import current_mesh
from tp_plugin.shard import is_sharded, models_in, standing_by


def install(peft_model: Any) -> None:
    """Patch ``PeftModel``."""
    wrap(peft_model.PeftModel, "save_pretrained", _save_pretrained)


def _save_pretrained(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    sharded = [model for _, model in models_in(self) if is_sharded(model)] if mesh is not None else []
    if mesh is None or mesh.is_leader or not sharded:
        return original(self, save_directory, *args, **kwargs)
    if kwargs.get("state_dict") is None:
        for model in sharded:  # the leader reads the whole state dict; stay until it has
            with standing_by(model):
                pass
    return None
