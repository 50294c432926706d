"""PEFT: an adapter is saved by one rank of each TP group."""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.parallel.exchange import exchange
from tp_plugin.parallel.mesh import current_mesh
from tp_plugin.shard import is_sharded, models_in


def install(peft_model: Any) -> None:
    """Patch ``PeftModel``."""
    wrap(peft_model.PeftModel, "save_pretrained", _save_pretrained)


def _save_pretrained(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None or not any(is_sharded(model) for _, model in models_in(self)):
        return original(self, save_directory, *args, **kwargs)
    with exchange(mesh).together("PeftModel.save_pretrained"):
        return original(self, save_directory, *args, **kwargs) if mesh.is_leader else None
