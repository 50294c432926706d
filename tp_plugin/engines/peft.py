"""PEFT: an adapter is saved by one rank of each TP group, and merged by all."""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.parallel.exchange import exchange
from tp_plugin.parallel.mesh import current_mesh
from tp_plugin.shard import is_sharded, models_in


def install(peft_model: Any) -> None:
    """Patch ``PeftModel``."""
    wrap(peft_model.PeftModel, "save_pretrained", _save_pretrained)


def install_tuners(tuners_utils: Any) -> None:
    """Patch ``BaseTuner``: what merges and unloads adapters."""
    wrap(tuners_utils.BaseTuner, "_unload_and_optionally_merge", _unload)


def _unload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Each rank merges its shares; then the base layers stand where the adapters' were."""
    records: list[Any] = [model.tp_record for _, model in models_in(self) if is_sharded(model)]
    if not records:
        return original(self, *args, **kwargs)
    with exchange(records[0].mesh).together("merge_and_unload"):  # a peer reads what is merged here by its new name
        for record in records:
            record.parameters()
        result = original(self, *args, **kwargs)
        for record in records:
            record.rename()
    return result


def _save_pretrained(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None or not any(is_sharded(model) for _, model in models_in(self)):
        return original(self, save_directory, *args, **kwargs)
    with exchange(mesh).together("PeftModel.save_pretrained"):
        return original(self, save_directory, *args, **kwargs) if mesh.is_leader else None
