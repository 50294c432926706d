"""PEFT's methods other than LoRA beside a linear that is split: one table of what each of their layers computes with.

A tensor is described by what its dimensions run over. Along ``out`` or ``in`` it is split like the linear, if that is
what the linear is split along; all else is whole, and every rank computes a part of its gradient, from its own part of
what the layer computes. What is added to a row-parallel product joins it before the sum over the ranks, so that no
collective is added; what acts on outputs acts on their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.policy.layout import ParamLayout, Parts
from tp_plugin.policy.packed import is_packed
from tp_plugin.policy.plan import AdapterPlan
from tp_plugin.policy.scope import Scope


@dataclass(frozen=True)
class Method:
    """Where PEFT's layer of one method is split.

    Attributes:
        place: whether it acts on the linear's ``input`` or ``output``, or computes something ``beside`` it to be added.
        tensors: parameters and buffers by the layer's attribute → what their dimensions run over.
        results: methods that compute with whole parameters → the dimensions of what they return, of which this rank
            takes its part.
        by_delta: the layer is to compute with the whole change of the weight, ``get_delta_weight``, as it has no method
            that returns something smaller.
        block: the attribute that says of each adapter how many features in a row belong together.
    """

    place: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_delta: bool = False
    block: str = ""

    @property
    def counts_whole(self) -> bool:
        """Whether the layer's counts of features are those of the whole linear."""
        return bool(self.results)


DELTA = {"get_delta_weight": ("out in",)}
FACTORS = ("r in", "out r")
METHODS = {
    "adalora": Method("beside", {"lora_A": "r in", "lora_B": "out r"}),
    "beft": Method("output", {"beft_bias": "1 out"}),
    "delora": Method("beside", results=DELTA, by_delta=True),
    "fourierft": Method("beside", results=DELTA),
    "gralora": Method("beside", results=DELTA, by_delta=True),
    "hira": Method("beside", {"hira_A": "r in", "hira_B": "out r"}),
    "ia3": Method("output", {"ia3_l": "out 1"}),
    "ia3 feedforward": Method("input", {"ia3_l": "1 in"}),
    "loha": Method("beside", results=DELTA),
    "lokr": Method("beside", results=DELTA),
    "oft": Method("input", {"oft_R": "in n"}, block="oft_block_size"),
    "psoft": Method("beside", {"_psoft_A_cache": "r in", "_psoft_B_cache": "out r"}),
    "randlora": Method("beside", results={"get_scaled_bases": FACTORS}),
    "road": Method("output", {"road_theta": "out", "road_alpha": "out"}, block="group_size"),
    "tinylora": Method("beside", {"tinylora_A": "r in", "tinylora_B": "out r"}),
    "unilora": Method("beside", results={"_get_lora_matrices": FACTORS}),
    "vblora": Method("beside", results={"_get_lora_matrices": FACTORS}),
    "vera": Method("beside", {"vera_lambda_b": "out", "vera_A": "r in", "vera_B": "out r"}),
    "waveft": Method("beside", results=DELTA),
}
"""By the name of PEFT's package (``peft.tuners.…``)."""

REFUSED = {
    "boft": "its rotations mix features of all ranks",
    "c3a": "the gradient that PEFT computes for its input is not the derivative of its output",
    "frod": "it decomposes the whole weight",
    "hra": "its reflections mix features of all ranks",
    "osf": "it decomposes the whole weight",
    "shira": "it computes with the base layer's weight instead of the base layer",
}


def plan_method(scope: Scope, path: str, module: Any, parts: Parts, *, column: bool) -> None:
    """Claim the adapters of PEFT's layer at ``path``, around a linear whose split dimension has ``parts``."""
    method = _method(scope, path, module)
    axis = "out" if column else "in"
    size = module.out_features if column else module.in_features
    for name, key, adapter in _parameters(scope, path):
        shape = tuple(scope.parameters[name].shape)
        axes = method.tensors.get(key, "").split()
        dim = axes.index(axis) if axis in axes and shape[axes.index(axis)] > 1 else None
        if dim is not None:
            block = getattr(module, method.block)[adapter] if method.block else 1
            scope.claim(name, ParamLayout(shape, dim, _scaled(scope, name, parts, shape[dim], size, block)))
            continue
        scope.claim(name, ParamLayout.replicated(shape, scope.plan.tp))
        if column or method.place != "output":
            scope.plan.partial.add(name)
    if not method.counts_whole:
        _count(scope, path, module, axis, parts)
    for child in module._modules if method.place == "beside" else ():
        if child.endswith("_dropout"):
            for adapter in module._modules[child]:
                scope.plan.dropouts[f"{path}.{child}.{adapter}"] = "replicated" if column else "sharded"
    buffers = {
        key: axes.split().index(axis)
        for key, axes in method.tensors.items()
        if axis in axes.split() and next(iter(getattr(module, key).values()), None) is not None
        if not any(True for _ in getattr(module, key).parameters())
    }
    results = {
        name: tuple(axes.split().index(axis) if axis in axes.split() else None for axes in found)
        for name, found in method.results.items()
    }
    summed = method.place == "beside" and not column
    if buffers or results or summed:
        whole = (module.out_features, module.in_features)
        scope.plan.adapters[path] = AdapterPlan(whole, size, parts, buffers, results, method.by_delta, summed)


def _method(scope: Scope, path: str, module: Any) -> Method:
    kind = type(module)
    package = kind.__module__.split(".")
    name = package[2] if kind.__module__.startswith("peft.tuners.") else ""
    if name == "ia3" and module.is_feedforward:
        name = "ia3 feedforward"
    found = f"{path} is wrapped by {kind.__module__}.{kind.__name__}"
    if name not in METHODS:
        reason = REFUSED.get(name, "no test proves it")
        supported = ", ".join(sorted({key.split()[0] for key in METHODS}))
        scope.fail(f"{found}, which cannot be sharded: {reason}. Of PEFT's methods, LoRA, DoRA and {supported} can")
    if is_packed(module.base_layer) or package[-1] != "layer":
        scope.fail(f"{found}; beside a quantized linear only LoRA and DoRA can be sharded")
    if METHODS[name].by_delta and isinstance(module.base_layer, Conv1D):
        scope.fail(f"{found}, which can be sharded beside an nn.Linear only, not beside a Conv1D")
    for dropout in ("rank_dropout", "module_dropout"):
        if any(getattr(module, dropout, {}).values()):
            scope.fail(f"{found} with {dropout}, of which no test proves that all ranks draw it alike; set it to 0")
    hybrids = [name for name, r in getattr(module, "hybrid_r", {}).items() if r]
    if any(isinstance(module.gralora_dropout[name], nn.Dropout) for name in hybrids):
        scope.fail(f"{found} with hybrid_r, which drops its input twice; set hybrid_r or gralora_dropout to 0")
    if any(rotation.coft for rotation in getattr(module, "oft_R", {}).values()):
        scope.fail(f"{found} with coft, whose bound depends on the number of blocks in the whole layer; set coft=False")
    return METHODS[name]


def _parameters(scope: Scope, path: str) -> Iterator[tuple[str, str, str]]:
    """Name, attribute and adapter of each parameter of the adapters at ``path``."""
    for name in scope.below(path):
        key, _, rest = name.removeprefix(f"{path}.").partition(".")
        if key != "base_layer":
            yield name, key, rest.partition(".")[0]


def _scaled(scope: Scope, name: str, parts: Parts, length: int, size: int, block: int) -> Parts:
    """``parts`` of ``size`` features as parts of a dimension of ``length``, which has some numbers for each block."""
    for edge in {edge for part in parts for r in part for edge in r}:
        if edge % block or edge * length % size:
            scope.fail(
                f"{name} has numbers for blocks of {block} features, but ranks' features meet at {edge}; choose a "
                "smaller block, or another tp_size"
            )
    return tuple(tuple((a * length // size, b * length // size) for a, b in part) for part in parts)


def _count(scope: Scope, path: str, module: Any, axis: str, parts: Parts) -> None:
    """Each rank's layer counts its own features, and OFT's rotations their own blocks."""
    counts = tuple(sum(b - a for a, b in part) for part in parts)
    scope.plan.attributes[path, f"{axis}_features"] = counts
    for adapter, rotation in getattr(module, "oft_R", {}).items() if axis == "in" else ():
        at, block = f"{path}.oft_R.{adapter}", rotation.block_size
        if any(edge % block for part in parts for r in part for edge in r):
            scope.fail(
                f"{at} rotates blocks of {block} features, of which some are on two ranks; choose smaller blocks"
            )
        scope.plan.attributes[at, "in_features"] = counts
        if not rotation.block_share:
            scope.plan.attributes[at, "r"] = tuple(count // block for count in counts)
