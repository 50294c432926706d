"""LoRA beside a sharded linear: the adapter's layout follows from its base layer's.

y = W x + B A dropout(x) (Hu et al. 2021). Column-parallel W: B is split by W's output features; A is whole, and its
gradient, of which each rank computes the part that its outputs need, is summed. Row-parallel W: A is split by W's input
features and its product (…, r) reduced like W's; B is whole. A head is column-parallel, its B split by vocabulary rows
like it. Of an embedding, whose output is B A[:, id], A is split by its vocabulary, and B is whole.

DoRA (Liu et al. 2024) scales each output by m / n, where n is the norm of its row of W + B A. Column-parallel W (also
a head): m is split like the outputs, and all of a row is here. Row-parallel W (also an embedding, of whose outputs the
rows run over the vocabulary): n² is a sum over the ranks, and m is whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.policy.layout import ParamLayout, Parts
from tp_plugin.policy.packed import EIGHT_BITS
from tp_plugin.policy.scope import Scope


def is_adapted(module: Any) -> bool:
    """Whether ``module`` wraps a linear layer, as PEFT's tuner layers do."""
    return hasattr(module, "base_layer")


def variants_of(path: str, module: Any) -> list[str]:
    """The modules that may run in place of the one at ``path``: itself, or PEFT's ``modules_to_save`` and what it was.

    Each has weights of its own and is laid out alike.
    """
    if not hasattr(type(module), "adapter_layer_names") or "modules_to_save" not in module._modules:
        return [path]
    return [f"{path}.original_module", *(f"{path}.modules_to_save.{name}" for name in module.modules_to_save)]


def plan_vocabulary_adapters(scope: Scope, path: str, module: Any, base: ParamLayout) -> None:
    """Claim the adapters around the embedding or head at ``path``, whose weight is laid out by ``base``."""
    plan, parameters = scope.plan, scope.parameters
    _refuse_others(scope, path, module)
    for name in module.lora_embedding_A:
        a, b = f"{path}.lora_embedding_A.{name}", f"{path}.lora_embedding_B.{name}"
        scope.claim(a, ParamLayout(tuple(parameters[a].shape), 1, base.parts, base.pad_to))
        scope.claim(b, ParamLayout.replicated(tuple(parameters[b].shape), plan.tp))
        plan.adapted_embeddings.append((path, name))
        _plan_magnitude(scope, path, module, name, None, "embedding")
    for name in module.lora_A:
        a, b = f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}"
        scope.claim(a, ParamLayout.replicated(tuple(parameters[a].shape), plan.tp))
        for parameter in ("weight", "bias"):
            if f"{b}.{parameter}" in parameters:
                shape = tuple(parameters[f"{b}.{parameter}"].shape)
                scope.claim(f"{b}.{parameter}", ParamLayout(shape, 0, base.parts, base.pad_to))
        plan.heads.append(b)
        _plan_magnitude(scope, path, module, name, base, "head")


def is_lora(module: Any) -> bool:
    """Whether ``module`` is PEFT's layer of LoRA. (AdaLoRA's holds bare parameters.)"""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _refuse_others(scope: Scope, path: str, module: Any) -> None:
    if not is_lora(module):
        found = f"{type(module).__module__}.{type(module).__name__}"
        scope.fail(f"{path} is wrapped by {found}; of PEFT's methods only LoRA and DoRA go on a head or an embedding")
    found = ", ".join(type(v).__name__ for v in module.lora_variant.values() if not type(v).__name__.startswith("Dora"))
    if found:
        scope.fail(f"{path} has a LoRA variant ({found}); of these only DoRA (use_dora=True) can be sharded")


def _plan_magnitude(
    scope: Scope, path: str, module: Any, name: str, outputs: ParamLayout | None, kind: str | None
) -> None:
    """Claim DoRA's magnitudes, if there are some.

    Args:
        outputs: layout of a tensor of which dimension 0 are the outputs, where these are split.
        kind: what :attr:`Plan.magnitudes` says of it.
    """
    if name not in module.lora_magnitude_vector:
        return
    if type(module.base_layer).__name__ == EIGHT_BITS:
        scope.fail(f"{path} has DoRA beside a linear in 8 bits, which no test proves; load it in 4 bits, or in 16")
    magnitude = f"{path}.lora_magnitude_vector.{name}"
    shape = tuple(scope.parameters[f"{magnitude}.weight"].shape)
    whole = ParamLayout.replicated(shape, scope.plan.tp)
    scope.claim(
        f"{magnitude}.weight", ParamLayout(shape, 0, outputs.parts, outputs.pad_to) if outputs is not None else whole
    )
    if kind is not None:
        scope.plan.magnitudes[magnitude] = kind


def plan_adapters(scope: Scope, path: str, module: Any, parts: Parts, *, column: bool) -> None:
    """Claim the adapters around the base layer at ``path``, whose split dimension has ``parts``."""
    _refuse_others(scope, path, module)
    plan, parameters = scope.plan, scope.parameters
    for name in module.lora_A:
        a, b = f"{path}.lora_A.{name}", f"{path}.lora_B.{name}"
        shape_a, shape_b = (tuple(parameters[f"{p}.weight"].shape) for p in (a, b))
        if column:
            scope.claim(f"{a}.weight", ParamLayout.replicated(shape_a, plan.tp))
            plan.partial.add(f"{a}.weight")
            scope.claim(f"{b}.weight", ParamLayout(shape_b, 0, parts))
            plan.columns.append(b)
        else:
            scope.claim(f"{a}.weight", ParamLayout(shape_a, 1, parts))
            scope.claim(f"{b}.weight", ParamLayout.replicated(shape_b, plan.tp))
            plan.rows.append(a)
        if f"{b}.bias" in parameters:
            bias = shape_b[:1]
            scope.claim(f"{b}.bias", ParamLayout(bias, 0, parts) if column else ParamLayout.replicated(bias, plan.tp))
        outputs = ParamLayout(shape_b, 0, parts) if column else None
        _plan_magnitude(scope, path, module, name, outputs, None if column else "row")
        # the dropout's input is whole for a column-parallel base, this rank's share for a row-parallel one
        plan.dropouts[f"{path}.lora_dropout.{name}"] = "replicated" if column else "sharded"
