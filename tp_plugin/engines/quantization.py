"""Quantized bases and optimizer states: what cannot be cut is refused, and each rank quantizes on its own device."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy.lora import is_adapted
from tp_plugin.policy.packed import EIGHT_BITS, FOUR_BITS, block_size, refuse_ragged
from tp_plugin.shard.block_states import has_codes, name_of
from tp_plugin.shard.quantized import packed_in

NEEDED = {
    "gptq": "codes cut in units of 8 output features and at its groups of input features, without act-order",
    "awq": "codes cut in units of 8 output features and at its groups of input features",
    "torchao": "layouts for the tensor subclasses it puts in a weight's place",
    "hqq": "layouts for its groups, of which a zero point and a scale are kept each",
    "fp8": "cuts at its blocks of 128 x 128, and scales that follow them",
    "fbgemm_fp8": "scales of activations that are reduced over the TP group",
    "compressed-tensors": "layouts for each of its formats",
}
"""Other methods, and what sharding them would take."""

OLDEST = "0.50"
"""Of bitsandbytes' releases; pyproject.toml asks for it, too."""

_UNSCALED = (
    "in 8 bits, and FSDP2 parts such a weight from its scales; use load_in_4bit, DDP (distributed_type: MULTI_GPU) or "
    "DeepSpeed ZeRO"
)


def check_quantization(config: Any, quantization: Any, options: RunConfig) -> None:
    """Refuse what cannot be cut, while nothing is lost.

    Args:
        config: the model's config, or its model type.
        quantization: a quantization config, or what a checkpoint says of one.

    Raises:
        TPError: another method than bitsandbytes, or something that its weights are not proven with.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    if options.unit_size == 1 or model_type in options.leave_whole:
        return
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    default = "bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else "unknown"
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method") or default))
    start = f"this {model_type} model is to be quantized (quantization_config)"
    if not method.startswith("bitsandbytes"):
        needed = f"; it would take {NEEDED[method]}" if method in NEEDED else ""
        raise TPError(
            f"{start} by {method}, and {options.sizes} cannot split its weights{needed}. Load the model in 16 bits, "
            "quantize it by bitsandbytes (BitsAndBytesConfig), or set tp_size: 1"
        )
    if given.get("load_in_8bit") and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise TPError(f"{start} {_UNSCALED}")
    _check_version()
    for key in ("llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"):
        if given.get(key):
            raise TPError(f"{start} with {key}, which {options.sizes} cannot split; remove {key}, or set tp_size: 1")


def _check_version() -> None:
    try:
        found = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return  # transformers says what to install
    if Version(found) < Version(OLDEST):
        raise TPError(
            f"bitsandbytes {found} is installed, whose codes are laid out otherwise; a tp_size needs {OLDEST} or "
            "later: pip install -U bitsandbytes"
        )


def check_linears(model: nn.Module) -> None:
    """Refuse linears of which no rows can be decoded alone, by name, before weights load."""
    for path, module in packed_in(model):
        if type(module).__name__ == FOUR_BITS:
            try:
                refuse_ragged(module, block_size(module))
            except PolicyError as error:
                raise TPError(f"{path} cannot be split over a TP group: {error}") from None


def own_device(device_map: Any) -> Any:
    """A device map of one device, which is this rank's: a script that names its process's means that.

    ``None`` would be the current device, which is the first one until an Accelerator is made.
    """
    if isinstance(device_map, dict) and (set(device_map) != {""} or str(device_map[""]) in ("cpu", "disk", "meta")):
        return device_map
    if not torch.accelerator.is_available():
        return device_map
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return {"": torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")) % count)}  # type: ignore[union-attr]


def refuse_fsdp2(model: nn.Module) -> None:
    """Raise if FSDP2 is to split a weight in 8 bits, or a parameter of an adapter that several linears share."""
    for path, module in packed_in(model):
        if type(module).__name__ == EIGHT_BITS:
            raise TPError(f"{path} is quantized {_UNSCALED}")
    users: dict[int, str] = {}
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("peft.") or not is_adapted(module):
            continue
        for parameter in {id(p): p for p in module.parameters() if p.requires_grad}.values():
            if users.setdefault(id(parameter), path) != path:
                raise TPError(
                    f"{users[id(parameter)]} and {path} share a parameter of {type(module).__module__}, and FSDP2 "
                    "takes none of several layers (without tp_size it fails there as well); use another method, such "
                    "as LoRA, or DDP (distributed_type: MULTI_GPU)"
                )


def refuse_optimizer(optimizer: torch.optim.Optimizer, engine: str) -> None:
    """Raise if ``optimizer`` keeps its states in 8 bits, and ``engine`` is one that cuts shards once more."""
    if has_codes(optimizer):
        alone = " (without tp_size it fails there as well)" if engine == "FSDP2" else ""
        raise TPError(
            f"{name_of(optimizer)} keeps its state in 8 bits, one scale for each block of elements; {engine} cuts the "
            f"shards of a tp_size once more, and blocks with them{alone}. Use DDP (distributed_type: MULTI_GPU), or a "
            'torch optimizer (optim="adamw_torch_fused")'
        )
