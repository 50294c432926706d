"""PEFT: an adapter is saved by one rank of each TP group, and merged by all; a prefix is divided by heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.engines.patching import wrap
from tp_plugin.engines.quantized_merge import refuse_merge
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.errors import TPError
from tp_plugin.policy import Plan
from tp_plugin.policy.layout import Parts
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.shard import is_sharded, models_in
from tp_plugin.tensor.regions import copy_to_tp


def install(peft_model: Any) -> None:
    """Patch ``PeftModel``."""
    wrap(peft_model.PeftModel, "save_pretrained", _save_pretrained)
    wrap(peft_model.PeftModel, "get_prompt", _get_prompt)


def install_tuners(tuners_utils: Any) -> None:
    """Patch ``BaseTuner``: what merges and unloads adapters."""
    wrap(tuners_utils.BaseTuner, "_unload_and_optionally_merge", _unload)
    wrap(tuners_utils.BaseTuner, "merge_adapter", _merge)
    wrap(tuners_utils.BaseTuner, "unmerge_adapter", _merge)


def install_dora(dora: Any) -> None:
    """Patch ``peft.tuners.lora.dora``: on a CPU it puts a copy in the place of a weight in codes, which is no shard."""
    wrap(dora, "dequantize_module_weight", _dequantize)


def _dequantize(original: Any, module: nn.Module) -> Any:
    weight = module.weight
    found = original(module)
    if module.weight is not weight:
        module._parameters["weight"] = weight  # type: ignore[assignment]
    return found


def _merge(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Each rank merges its shares, or takes them out again; sums over ranks (DoRA's norms) are taken by all."""
    if not any(is_sharded(model) for _, model in models_in(self)):
        return original(self, *args, **kwargs)
    refuse_merge(self)
    with require().sessions.together("merge_adapter"), require().region.step():
        return original(self, *args, **kwargs)


def _unload(original: Any, self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    """Each rank merges its shares; then the base layers stand where the adapters' were."""
    records: list[Any] = [model.tp_record for _, model in models_in(self) if is_sharded(model)]
    if not records:
        return original(self, merge, *args, **kwargs)
    if merge:
        refuse_merge(self)
    with require().sessions.together("merge_and_unload"):  # a peer reads what is merged here by its new name
        for record in records:
            record.index.tensors()
        with require().region.step():
            result = original(self, merge, *args, **kwargs)
        for record in records:
            record.follow_renames()
    return result


def _save_pretrained(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None or not any(is_sharded(model) for _, model in models_in(self)):
        return original(self, save_directory, *args, **kwargs)
    with require().sessions.together("PeftModel.save_pretrained"):
        return in_step(original, self, save_directory, *args, **kwargs) if mesh.is_leader else None


def _get_prompt(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of keys and values that are learned (prefix tuning, cartridges), each rank has those of its heads.

    What they are made from is whole on every rank; its gradient, of which each rank computes a part, is summed.
    """
    model: Any = next((model for _, model in models_in(self) if is_sharded(model)), None)
    if model is None or self.active_peft_config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        return original(self, *args, **kwargs)
    if model.tp_record.mesh.pp_size > 1:
        raise TPError(
            f"{self.active_peft_config.peft_type.value} gives keys and values to every layer, "
            "which stand on different pipeline stages; write pp_size: 1"
        )
    tp = model.tp_record.mesh.tp
    hook = self.prompt_encoder[self.active_adapter].register_forward_hook(lambda _, given, made: copy_to_tp(made, tp))
    try:
        prompt = original(self, *args, **kwargs)
    finally:
        hook.remove()
    heads = _key_heads(model)
    for index, layer in enumerate(getattr(prompt, "self_attention_cache", prompt).layers):
        if index in heads and layer.is_initialized:
            count = max(end for part in heads[index] for _, end in part)
            if layer.keys.shape[1] != count:
                raise TPError(
                    f"the prefix has {layer.keys.shape[1]} heads, but layer {index} of {type(model).__name__} has "
                    f"{count} key/value heads; set num_attention_heads={count} in its PEFT config"
                )
            mine = [head for a, b in heads[index][tp.rank] for head in range(a, b)]
            layer.keys, layer.values = layer.keys[:, mine], layer.values[:, mine]
    return prompt


def _key_heads(model: Any) -> dict[int, Parts]:
    """Of each layer that has a cache, by its index there: which key/value heads each rank has."""
    found: dict[int, Parts] = {}
    plan: Plan = model.tp_record.plan
    for path, block in plan.blocks.items():
        inside: list[nn.Module] = list(model.get_submodule(path).modules())
        index = next((m.layer_idx for m in inside if getattr(m, "layer_idx", None) is not None), None)
        if block.heads is None or index is None:
            continue
        heads = plan.key_heads(path)
        if found.setdefault(index, heads) != heads:
            raise TPError(
                f"{path} has other key/value heads than another attention of layer {index}; prefix tuning of such a "
                "model is not supported with a tp_size"
            )
    return found
