"""In a worker with a ``tp_size``: patch each library when it is imported, and torch, which is."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tp_plugin.config.keys import ENV_REPORT
from tp_plugin.launch.failures import install_in_launcher, install_in_worker
from tp_plugin.launch.imports import after_import

_PATCHES = {
    "accelerate.state": ("tp_plugin.engines.accelerate.state", "install"),
    "accelerate.utils.operations": ("tp_plugin.engines.accelerate.operations", "install_operations"),
    "accelerate.utils.random": ("tp_plugin.engines.accelerate.operations", "install_random"),
    "accelerate.utils.other": ("tp_plugin.engines.accelerate.utilities", "install"),
    "huggingface_hub.hub_mixin": ("tp_plugin.engines.saving", "install_hub_mixin"),
    "accelerate.data_loader": ("tp_plugin.engines.accelerate.loaders", "install"),
    "accelerate.checkpointing": ("tp_plugin.engines.accelerate.prepare", "install_checkpointing"),
    "accelerate.local_sgd": ("tp_plugin.engines.accelerate.prepare", "install_local_sgd"),
    "accelerate.accelerator": ("tp_plugin.engines.accelerate.prepare", "install"),
    "transformers.modeling_utils": ("tp_plugin.engines.transformers", "install"),
    "transformers.trainer_pt_utils": ("tp_plugin.engines.trainer", "install_helpers"),
    "transformers.trainer_utils": ("tp_plugin.engines.trainer", "install_utils"),
    "transformers.training_args": ("tp_plugin.engines.trainer", "install_arguments"),
    "transformers.trainer_jit_checkpoint": ("tp_plugin.engines.trainer", "install_jit_checkpoint"),
    "transformers.trainer": ("tp_plugin.engines.trainer", "install"),
    "transformers.generation.utils": ("tp_plugin.engines.transformers", "install_generation"),
    "deepspeed": ("tp_plugin.engines.deepspeed.initialize", "install"),
    "deepspeed.comm.torch": ("tp_plugin.engines.deepspeed.groups", "install_backend"),
    "deepspeed.runtime.config": ("tp_plugin.engines.deepspeed.initialize", "install_config"),
    "deepspeed.runtime.dataloader": ("tp_plugin.engines.deepspeed.data", "install"),
    "deepspeed.runtime.engine": ("tp_plugin.engines.deepspeed.initialize", "install_engine"),
    "deepspeed.utils": ("tp_plugin.engines.deepspeed.script_access", "install_utils"),
    "deepspeed.utils.zero_to_fp32": ("tp_plugin.engines.deepspeed.checkpoint", "install_recovery"),
    "deepspeed.runtime.zero.partition_parameters": ("tp_plugin.engines.deepspeed.initialize", "install_zero_init"),
    "deepspeed.runtime.zero.parameter_offload": ("tp_plugin.engines.deepspeed.script_access", "install_offload"),
    "deepspeed.runtime.zero.stage_1_and_2": ("tp_plugin.engines.deepspeed.norms", "install_zero12"),
    "deepspeed.runtime.zero.stage3": ("tp_plugin.engines.deepspeed.norms", "install_zero3"),
    "deepspeed.runtime.bf16_optimizer": ("tp_plugin.engines.deepspeed.norms", "install_bf16"),
    "deepspeed.runtime.fp16.fused_optimizer": ("tp_plugin.engines.deepspeed.norms", "install_fp16"),
    "deepspeed.runtime.fp16.unfused_optimizer": ("tp_plugin.engines.deepspeed.norms", "install_unfused"),
    "accelerate.utils.deepspeed": ("tp_plugin.engines.deepspeed.initialize", "install_hf_config"),
    "accelerate.utils.fsdp_utils": ("tp_plugin.engines.fsdp2.prepare", "install_files"),
    "accelerate.utils.dataclasses": ("tp_plugin.engines.fsdp2.config", "install"),
    "torch.distributed.checkpoint.state_dict": ("tp_plugin.engines.fsdp2.checkpoint", "install"),
    "torch.distributed.fsdp": ("tp_plugin.engines.fsdp2.wrapping", "install"),
    "torch.distributed.fsdp._fully_shard._fsdp_state": ("tp_plugin.engines.fsdp2.wrapping", "install_state"),
    "torch.distributed.fsdp._fully_shard._fsdp_param": ("tp_plugin.engines.fsdp2.wrapping", "install_param"),
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": ("tp_plugin.engines.fsdp2.wrapping", "install_group"),
    "peft.peft_model": ("tp_plugin.engines.peft", "install"),
    "peft.tuners.tuners_utils": ("tp_plugin.engines.peft", "install_tuners"),
    "peft.tuners.lora.bnb": ("tp_plugin.engines.quantized_merge", "install"),
    "peft.tuners.lora.dora": ("tp_plugin.engines.peft", "install_dora"),
    "swift.dataloader.shard": ("tp_plugin.engines.swift", "install_loader"),
    "swift.dataloader.dispatcher": ("tp_plugin.engines.swift", "install_loader"),
    "swift.trainers.arguments": ("tp_plugin.engines.swift", "install_sizes"),
    "swift.trainers.utils": ("tp_plugin.engines.swift", "install_sizes"),
    "liger_kernel.transformers.monkey_patch": ("tp_plugin.engines.liger", "install"),
    "liger_kernel.chunked_loss": ("tp_plugin.engines.liger", "install_losses"),
    "trl.trainer.utils": ("tp_plugin.engines.trl", "install"),
    "trl.trainer.grpo_trainer": ("tp_plugin.engines.trl", "install_rewards"),
    "trl.trainer.rloo_trainer": ("tp_plugin.engines.trl", "install_rewards"),
    "sentence_transformers.util.distributed": ("tp_plugin.engines.sentence_transformers", "install"),
    "pylate.utils.distributed": ("tp_plugin.engines.sentence_transformers", "install"),
    "trl.trainer.sft_trainer": ("tp_plugin.engines.trl", "install_chunks"),
    "trl.trainer.distillation_trainer": ("tp_plugin.engines.trl", "install_chunks"),
    "trl.kernels.chunked_divergence": ("tp_plugin.engines.trl", "install_distillation"),
}
"""Module → the function of an engine that patches it once it is imported."""


_registered: set[str] = set()
"""Modules that are patched, or are to be when they are imported."""


def register(library: str = "") -> None:
    """Register the import hooks (of one library), once; a module that is imported already is patched at once."""
    from tp_plugin.engines import torch_utils

    torch_utils.install()  # now: scripts import get_total_norm by name
    for module, (engine, function) in _PATCHES.items():
        if module.startswith(library) and module not in _registered:
            _registered.add(module)
            after_import(module, _patcher(engine, function))
    if "launcher" not in _registered:
        _registered.add("launcher")
        install_in_worker()
        after_import("torch.distributed.launcher.api", install_in_launcher)  # this process may be torchrun
    if os.environ.get(ENV_REPORT):
        from tp_plugin.launch.report import write_at_exit

        write_at_exit(os.environ[ENV_REPORT])


def _patcher(engine: str, function: str) -> Any:
    def apply(module: Any) -> None:
        from tp_plugin.engines import patching

        patching.remember(_Registered(module.__name__))
        getattr(importlib.import_module(engine), function)(module)

    return apply


class _Registered:
    """Taken back with the patches, so that they can be applied again."""

    def __init__(self, module: str) -> None:
        self._module = module

    def remove(self) -> None:
        _registered.discard(self._module)
