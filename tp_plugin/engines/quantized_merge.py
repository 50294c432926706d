"""LoRA merged into a base in codes: each linear is whole for its own merge, one after the other, and is cut anew.

A merge quantizes the sum of weight and adapter, with scales over whole blocks, rows and tensors, of which a rank holds
a part. So PEFT's own code does it to the whole linear, on all ranks of a unit, and each keeps its part of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.engines.patching import wrap
from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.policy import ParamLayout
from tp_plugin.policy.packed import EIGHT_BITS, FOUR_BITS
from tp_plugin.runtime.runtime import require
from tp_plugin.shard import quantized
from tp_plugin.shard.full_tensor import gather_full_tensor
from tp_plugin.tensor.param_entry import layout_of


def install(bnb: Any) -> None:
    """Patch ``peft.tuners.lora.bnb``: layers around codes merge and unmerge whole, whoever asks them to."""
    for kind in (FOUR_BITS, EIGHT_BITS):
        if hasattr(bnb, kind):  # where bitsandbytes is installed
            wrap(getattr(bnb, kind), "merge", _whole)
            wrap(getattr(bnb, kind), "unmerge", _whole)


def refuse_merge(tuner: nn.Module) -> None:
    """Raise if an adapter is to be merged into codes that is no LoRA, or that an engine has split over replicas."""
    for path, layer in _on_codes(tuner):
        split = [p for p in layer.parameters() if is_split(p) or hasattr(p, "ds_id")]
        if split or any(layer.lora_variant.values()):
            why = "is split by ZeRO 3 or FSDP2" if split else "is no plain LoRA (use_dora or another variant)"
            raise TPError(
                f"{path} has a quantized base, and {why}: it cannot be merged with a tp_size. Save the adapter "
                "(save_pretrained), and merge it on one process without tp_size: load the base, quantized or "
                "(exactly) in 16 bits, PeftModel.from_pretrained, merge_and_unload"
            )


def _on_codes(tuner: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers around linears in codes of which this rank has a part."""
    return [
        (path, layer)
        for path, layer in tuner.named_modules()
        if hasattr(getattr(layer, "base_layer", None), "tp_codes") and hasattr(layer, "lora_variant")
    ]


def _whole(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's ``merge`` or ``unmerge`` of a layer. Collective over the unit."""
    base = self.base_layer
    if not hasattr(base, "tp_codes"):
        return original(self, *args, **kwargs)
    refuse_merge(self)
    runtime = require()
    mesh = runtime.mesh

    def gather(tensor: torch.Tensor, layout: ParamLayout | None) -> torch.Tensor:
        return gather_full_tensor(tensor, layout, mesh).to(base.weight.device)

    with runtime.region.step():
        adapters = [linear.weight for linears in (self.lora_A, self.lora_B) for linear in linears.values()]
        share, shares = base.weight, [weight.data for weight in adapters]
        scales = (base.state.CB, base.state.SCB) if hasattr(base, "state") else ()  # of 8 bits, after a forward
        whole = quantized.whole_weight(base, gather)
        wholes = [gather(weight.data, layout_of(weight)) for weight in adapters]
        try:
            _put(base, whole, adapters, wholes, (None, None))
            result = original(self, *args, **kwargs)
            merged = base.weight
        finally:  # these objects are known to optimizers, names and records
            _put(base, share, adapters, shares, scales)
        if merged is not whole:
            quantized.cut_from(base, merged, mesh.unit.rank)
    return result


def _put(
    base: Any, weight: nn.Parameter, adapters: list[nn.Parameter], data: list[torch.Tensor], scales: tuple[Any, ...]
) -> None:
    base._parameters["weight"] = weight
    for parameter, value in zip(adapters, data, strict=True):
        parameter.data = value
    if hasattr(base, "state"):
        base.state.CB, base.state.SCB = scales
