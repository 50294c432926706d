"""``zero.GatheredParameters`` undoes what DeepSpeed partitioned, not what is split by ``tp_size``: scripts are told."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.tensor.grad_norm import layout_of

LIBRARIES = {"accelerate", "contextlib", "deepspeed", "peft", "torch", "tp_plugin", "transformers", "trl"}
"""Callers that know, or that are told of shares elsewhere."""


def install(partition_parameters: Any) -> None:
    """Patch ``GatheredParameters``."""
    wrap(partition_parameters.GatheredParameters, "__enter__", _enter)


def _enter(original: Any, self: Any) -> Any:
    entered = original(self)
    caller = sys._getframe(2).f_globals.get("__name__", "").partition(".")[0]
    if self.enabled and caller not in LIBRARIES:
        for parameter in self.params:
            layout = layout_of(parameter)
            if layout is not None and layout.is_sharded:
                warnings.warn(
                    f"inside GatheredParameters a weight is this rank's share, {tuple(parameter.shape)} of "
                    f"{tuple(layout.shape)}; for whole weights take engine.save_16bit_model, "
                    "accelerator.get_state_dict(model) or `tp-plugin export` of a checkpoint",
                    stacklevel=3,
                )
                break
    return entered
