"""Tensor parallelism for Hugging Face fine-tuning scripts, by one key in the config: ``tp_size``.

This module is imported by PyTorch's autoload hook in every process that imports torch, so it imports
nothing itself: each public name is resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "parallelize": "tp_plugin.launch.api",
    "full_parameters": "tp_plugin.engines.full_parameters",
    "register": "tp_plugin.policy",
    "policy_for": "tp_plugin.policy",
    "Policy": "tp_plugin.policy",
    "Attention": "tp_plugin.policy",
    "MLP": "tp_plugin.policy",
    "Experts": "tp_plugin.policy",
    "Vocabulary": "tp_plugin.policy",
    "Blocks": "tp_plugin.policy",
    "PerHead": "tp_plugin.policy",
    "PerGroup": "tp_plugin.policy",
    "ParamLayout": "tp_plugin.policy",
    "TPError": "tp_plugin.errors",
    "plan": "tp_plugin.cli.plan",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
