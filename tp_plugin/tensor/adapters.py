"""PEFT's layers of methods other than LoRA beside a split linear: their code, on this rank's part of what it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.plan import AdapterPlan
from tp_plugin.tensor.forward import Forward, WrappedForward
from tp_plugin.tensor.global_view import any_global
from tp_plugin.tensor.linear import RowParallelForward


class _OfLayer(WrappedForward):
    """Stands in for a method of PEFT's layer, whose parameters lie in modules below."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's part in a step. Where the script calls the layer by itself: the layer's own, on whole tensors."""
        if any_global(self.module.parameters()):
            return self.own(*args, **kwargs)
        return self.run(*args, **kwargs)


class PartOfResult(_OfLayer):
    """What a method computes from whole parameters, of which this rank takes its part.

    Args:
        planned: the layer's plan.
        name: the method's name.
        rank: this rank in its TP group.
    """

    def __init__(self, module: nn.Module, own: Forward, planned: AdapterPlan, name: str, rank: int):
        super().__init__(module, own)
        self.planned, self.dims, self.rank = planned, planned.results[name], rank

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Its results in the order of PEFT's."""
        layer = vars(self.module)
        # some look at the shape of their linear's weight, which is a whole one's to what they compute
        base = SimpleNamespace(weight=torch.empty(self.planned.shape, device="meta"))
        layer["get_base_layer"] = lambda: base
        try:
            found = self.own(*args, **kwargs)
        finally:
            del layer["get_base_layer"]
        if isinstance(found, torch.Tensor):
            return part(found, self.dims[0], self.planned, self.rank)
        return tuple(part(one, dim, self.planned, self.rank) for one, dim in zip(found, self.dims, strict=True))


class PartsOfBuffers(Mapping[str, torch.Tensor]):
    """Buffers by adapter, which layers share and each slices from the front: this rank's part of them.

    Args:
        whole: PEFT's.
        dim: the dimension that is split.
        planned: the layer's plan.
        rank: this rank in its TP group.
    """

    def __init__(self, whole: Any, dim: int, planned: AdapterPlan, rank: int):
        self.whole, self.dim, self.planned, self.rank = whole, dim, planned, rank

    def __getitem__(self, adapter: str) -> torch.Tensor:
        return part(self.whole[adapter].narrow(self.dim, 0, self.planned.size), self.dim, self.planned, self.rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole.keys())

    def __len__(self) -> int:
        return len(self.whole)


class ByDelta(_OfLayer):
    """A forward with the change of the weight: W x + ΔW dropout(x)."""

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a linear takes → what it gives."""
        layer: Any = self.module
        if layer.disable_adapters or layer.merged:
            return self.own(x, *args, **kwargs)
        result: torch.Tensor = layer.base_layer(x, *args, **kwargs)
        dropouts = next(child for name, child in layer._modules.items() if name.endswith("_dropout"))
        for adapter in layer.active_adapters:
            if adapter in dropouts:
                delta = layer.get_delta_weight(adapter)
                result = result + F.linear(dropouts[adapter](x.to(delta.dtype)), delta).to(result.dtype)
        return result


class SummedLayer(_OfLayer):
    """A layer that adds something to its row-parallel linear's product, before both are summed over the ranks.

    Args:
        row: the forward of the linear.
    """

    def __init__(self, module: nn.Module, own: Forward, row: RowParallelForward):
        super().__init__(module, own)
        self.row = row

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This rank's features (…, in / tp) → the full output (…, out)."""
        self.row.keeps = True
        try:
            product = self.own(*args, **kwargs)
        finally:
            self.row.keeps = False
        return self.row.sum(product, fresh=False)


def part(whole: torch.Tensor, dim: int | None, planned: AdapterPlan, rank: int) -> torch.Tensor:
    """This rank's part of ``whole`` along ``dim``."""
    return whole if dim is None else ParamLayout(tuple(whole.shape), dim, planned.parts).shard(whole, rank)


def install(module: nn.Module, planned: AdapterPlan, rank: int) -> None:
    """Make PEFT's layer at ``module``, whose linear has its forward already, compute on this rank's part."""
    layer: Any = module
    for name, dim in planned.buffers.items():
        vars(layer)[name] = PartsOfBuffers(
            getattr(layer, name), dim, planned, rank
        )  # before the submodule of that name
    for name in planned.results:
        setattr(layer, name, PartOfResult(layer, getattr(layer, name), planned, name, rank))
    if planned.by_delta:
        ByDelta.install(layer)
    if planned.summed:
        SummedLayer.install(layer, layer.base_layer.forward)
