"""``zero.GatheredParameters`` undoes what DeepSpeed partitioned, not what ``tp_size`` split: scripts are told."""

from __future__ import annotations

import warnings
from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.runtime.runtime import current
from tp_plugin.tensor.param_entry import layout_of

LIBRARIES = ("accelerate", "deepspeed", "peft", "torch", "tp_plugin", "transformers", "trl")
"""Callers that know, or that are told of shards elsewhere."""


class ShardWarning(UserWarning):
    """A script reads this rank's shard of a weight where it may expect the full one."""


def install(partition_parameters: Any) -> None:
    """Patch ``GatheredParameters``."""
    warnings.filterwarnings("ignore", category=ShardWarning, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    wrap(partition_parameters.GatheredParameters, "__enter__", _enter)


def _enter(original: Any, self: Any) -> Any:
    entered = original(self)
    if not self.enabled or current() is None:
        return entered
    for parameter in self.params:
        layout = layout_of(parameter)
        if layout is not None and layout.is_sharded:
            warnings.warn(
                f"inside GatheredParameters a weight is this rank's shard, {tuple(parameter.shape)} of "
                f"{tuple(layout.shape)}; use `with tp_plugin.full_parameters(model):` instead, or "
                "take engine.save_16bit_model or accelerator.get_state_dict(model)",
                ShardWarning,
                stacklevel=3,
            )
            break
    return entered
