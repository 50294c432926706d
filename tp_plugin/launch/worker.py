"""In a worker with a ``tp_size``: patch each library when it is imported, and torch, which is."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tp_plugin.launch.imports import after_import

_PATCHES = {
    "accelerate.state": ("tp_plugin.engines.accelerate.state", "install"),
    "accelerate.utils.operations": ("tp_plugin.engines.accelerate.operations", "install_operations"),
    "accelerate.utils.random": ("tp_plugin.engines.accelerate.operations", "install_random"),
    "accelerate.data_loader": ("tp_plugin.engines.accelerate.loaders", "install"),
    "accelerate.checkpointing": ("tp_plugin.engines.accelerate.prepare", "install_checkpointing"),
    "accelerate.accelerator": ("tp_plugin.engines.accelerate.prepare", "install"),
    "transformers.modeling_utils": ("tp_plugin.engines.transformers", "install"),
    "transformers.trainer_pt_utils": ("tp_plugin.engines.trainer", "install_helpers"),
    "transformers.training_args": ("tp_plugin.engines.trainer", "install_arguments"),
    "transformers.trainer": ("tp_plugin.engines.trainer", "install"),
    "transformers.generation.utils": ("tp_plugin.engines.transformers", "install_generation"),
    "peft.peft_model": ("tp_plugin.engines.peft", "install"),
}
"""Module → the function of an engine that patches it once it is imported."""


def register() -> None:
    """Register the import hooks; a module that is imported already is patched at once."""
    from tp_plugin.engines import torch_utils

    torch_utils.install()  # now: scripts import get_total_norm by name
    for module, (engine, function) in _PATCHES.items():
        after_import(module, _patcher(engine, function))
    if os.environ.get("TP_PLUGIN_REPORT"):
        from tp_plugin.launch.report import write_at_exit

        write_at_exit(os.environ["TP_PLUGIN_REPORT"])


def _patcher(engine: str, function: str) -> Any:
    def apply(module: Any) -> None:
        getattr(importlib.import_module(engine), function)(module)

    return apply
