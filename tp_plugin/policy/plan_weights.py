"""Column- and row-parallel linears, and other parameters that are split along a dimension."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import PolicyError
from tp_plugin.policy.adapters import plan_method
from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.lora import is_adapted, is_lora, plan_adapters, variants_of
from tp_plugin.policy.packed import codes_layout, is_packed
from tp_plugin.policy.scope import Scope
from tp_plugin.policy.split import HeadSplit, Split


def plan_linear(scope: Scope, path: str, split: Split, heads: HeadSplit, *, column: bool) -> None:
    """Claim the linear at ``path``, and PEFT's adapters around it.

    A column-parallel weight is split by output features, a row-parallel one by input features
    (Shoeybi et al. 2019, section 3).
    """
    module = scope.modules.get(path)
    if module is None:
        scope.fail(f"there is no module {path!r}")
    if variants_of(path, module) != [path]:
        scope.fail(
            f"{path} is in modules_to_save, which can be sharded of the embedding and the head; inside of blocks, "
            "LoRA can: put it in target_modules, or train it without PEFT"
        )
    if is_adapted(module):
        if is_adapted(module.base_layer):
            scope.fail(f"{path} has two of PEFT's methods, one around the other; one can be sharded")
        plan_linear(scope, f"{path}.base_layer", split, heads, column=column)
        features = scope.plan.layouts[f"{path}.base_layer.weight"].features
        plan = plan_adapters if is_lora(module) else plan_method
        plan(scope, path, module, features.parts, column=column)
        return
    packed = is_packed(module)
    if not packed and type(module) not in (nn.Linear, Conv1D) and type(module).__name__ not in scope.policy.linears:
        scope.fail(
            f"{path} is a {type(module).__name__}; column- and row-parallel modules must be plain nn.Linear or "
            "Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt (other quantized and wrapped layers are not supported)"
        )
    weight = scope.parameters.get(f"{path}.weight")
    if weight is None:
        scope.fail(
            f"{path} has no parameter 'weight', but {sorted(name for name, _ in module.named_parameters())}: undo what "
            "computes its weight from others (torch.nn.utils.prune.remove, remove_weight_norm) before it is sharded, "
            "or set tp_size: 1"
        )
    # Conv1D keeps its weight as (in, out), nn.Linear as (out, in)
    out_dim = 1 if isinstance(module, Conv1D) else 0
    dim = out_dim if column else 1 - out_dim
    shape = (module.out_features, module.in_features) if packed else tuple(weight.shape)
    try:
        parts = split(shape[dim], scope.plan.tp, heads)
        layout = codes_layout(module, dim, parts) if packed else ParamLayout(shape, dim, parts)
    except PolicyError as error:
        scope.fail(f"{path}: {error}")
    scope.claim(f"{path}.weight", layout)
    if getattr(module, "bias", None) is not None:
        bias = tuple(scope.parameters[f"{path}.bias"].shape)
        # a row-parallel bias is added once, after the reduction: every rank holds all of it
        of_bias = ParamLayout(bias, 0, parts) if column else ParamLayout.replicated(bias, scope.plan.tp)
        scope.claim(f"{path}.bias", of_bias)
    (scope.plan.columns if column else scope.plan.rows).append(path)


def plan_tensor(scope: Scope, path: str, split: Split, dim: int, heads: HeadSplit) -> None:
    """Claim the parameter at ``path``, or each parameter of the module there, as split along ``dim``."""
    for name in scope.below(path):
        shape = tuple(scope.parameters[name].shape)
        if is_packed(scope.modules[name.rpartition(".")[0]]):
            scope.fail(f"{name} is quantized, and split as a tensor: leave it in 16 bits (llm_int8_skip_modules)")
        try:
            scope.claim(name, ParamLayout(shape, dim, split(shape[dim], scope.plan.tp, heads)))
        except PolicyError as error:
            scope.fail(f"{name}: {error}")
