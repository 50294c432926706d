"""Accelerate prepares a sharded model for FSDP2 by its own program, with the DP group for the world."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tp_plugin.engines import quantization
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import current_mesh
from tp_plugin.shard import local_states


def install(accelerator: Any) -> None:
    """Patch ``accelerate.accelerator``."""
    wrap(accelerator, "fsdp2_prepare_model", _prepare_model)
    wrap(accelerator.Accelerator, "_prepare_fsdp2", _prepare_fsdp2)


def install_files(fsdp_utils: Any) -> None:
    """Patch ``accelerate.utils.fsdp_utils``: full states, which process 0 writes, are written by one rank of it."""
    patch(fsdp_utils, "torch", _TorchSavedOnce())


class _TorchSavedOnce:
    """``torch`` for a module that saves on process 0, which is a TP group."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        mesh = current_mesh()
        if mesh is not None and mesh.data.rank > 0:
            raise TPError(
                f"{file}: files by process hold no whole shards under tp_size; save with use_dcp=True, or with "
                "fsdp_state_dict_type: FULL_STATE_DICT"
            )
        if mesh is None or mesh.is_leader:
            torch.save(content, file, *args, **kwargs)


def is_loaded_once(accelerator: Any) -> bool:
    """Whether only the first rank's weights count (``cpu_ram_efficient_loading``)."""
    return bool(accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise for optimizers that step with whole parameters or blocks, which no rank can hold beside FSDP2's rows."""
    quantization.refuse_optimizer(optimizer, "FSDP2")
    if getattr(optimizer, "tp_full_matrices", False):
        raise TPError(
            f"optimizer {type(optimizer).__name__} looks at whole matrices, of which FSDP2 and tp_size leave a rank "
            "rows of a part; use an elementwise one such as AdamW, or DDP (distributed_type: MULTI_GPU)"
        )


def _prepare_fsdp2(original: Any, self: Any, *args: Any) -> Any:
    """Accelerate finds an optimizer's parameters again by their memory, of which those on other stages have none."""
    modules = [one for one in args if isinstance(one, nn.Module)]
    absent = list(dict.fromkeys(p for module in modules for p in module.parameters() if not p.numel()))
    for number, parameter in enumerate(absent):
        parameter.data_ptr = functools.partial(int, -1 - number)  # type: ignore[method-assign]
    try:
        return original(self, *args)
    finally:
        for parameter in absent:
            del parameter.data_ptr


def _prepare_model(original: Any, accelerator: Any, model: nn.Module) -> Any:
    if current_mesh() is None:
        return original(accelerator, model)
    plugin = accelerator.state.fsdp_plugin
    # every rank has its share by now; Accelerate would broadcast rank 0's, which is another one
    loading, plugin.cpu_ram_efficient_loading = plugin.cpu_ram_efficient_loading, False
    try:
        with local_states():
            return original(accelerator, model)
    finally:
        plugin.cpu_ram_efficient_loading = loading
