"""The Python way in, for scripts that use torch.distributed themselves."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from tp_plugin.errors import TPError

if TYPE_CHECKING:
    from torch import nn

    from tp_plugin.policy import Policy


def parallelize(
    model: nn.Module, tp_size: int | None = None, policy: Policy | None = None, *, pp_size: int | None = None
) -> nn.Module:
    """Shard ``model`` in place over TP groups of ``tp_size`` neighbouring ranks. Collective over the world.

    torch's gradient norms, clipping and GradScaler see the whole model from here on, and ``deepspeed.initialize``
    trains it with ZeRO over the DP groups. Without DeepSpeed, data parallelism, one batch per TP group and saving on
    one rank are the script's own matter: ``tp_plugin.runtime.runtime.require().mesh`` has the groups.

    Args:
        model: a transformers model, or a module that contains some, with whole weights (the same on every rank, or the
            TP group's first rank's are taken).
        tp_size: ranks per TP group; default the configured one (``TP_PLUGIN_TP_SIZE``).
        policy: how to shard; default the registered policy for each model.
        pp_size: pipeline stages; default the configured ones (``TP_PLUGIN_PP_SIZE``).

    Raises:
        PolicyError: no policy, or one that does not fit.
        TPError: ``tp_size`` does not divide the world, differs from the run's, or comes too late for Accelerate.
    """
    import torch

    from tp_plugin.config.resolve import current_config
    from tp_plugin.engines import launch_report
    from tp_plugin.launch import worker
    from tp_plugin.runtime.runtime import current, current_mesh
    from tp_plugin.shard import parallelize as shard

    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    if state is not None and state._shared_state and current_mesh() is None:
        raise TPError(
            "tp_plugin.parallelize was called in a run that Accelerate already counts without tensor parallelism; set "
            "`tp_size` in the Accelerate config (or TP_PLUGIN_TP_SIZE in the environment) instead"
        )
    options = current_config()
    options = options if pp_size is None else replace(options, pp_size=pp_size)
    worker.register("deepspeed")
    if not torch.distributed.is_initialized() and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        torch.distributed.init_process_group()  # as deepspeed.initialize would, by the launcher's variables
    shard(model, tp_size or options.tp_size, policy, options=options)
    if (runtime := current()) is not None:
        launch_report.announce(runtime, "replicas are the script's own matter")
    return model
