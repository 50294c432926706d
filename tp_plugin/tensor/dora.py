"""DoRA beside a base whose rows are split, or whose outputs are a head's: y = (m / n) (W + s B A) x, n = ‖W + s B A‖.

n is the norm of each output's row; PEFT takes it for a constant in the backward. Its layer of magnitudes gives what is
added to the base's output, (m / n - 1) W x + (m / n) s B A x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor import regions
from tp_plugin.tensor.forward import Forward, WrappedForward
from tp_plugin.tensor.vocab import VocabularyColumns

Margins = tuple[tuple[int, int, int], ...]


class SummedNorm(WrappedForward):
    """The norm of rows of which every rank has a part: one all-reduce of a number for each output.

    Args:
        group: the TP group.
        margins: of weights in codes that hold more than this rank's features, where (packed.py).
    """

    method = "get_weight_norm"

    def __init__(self, module: nn.Module, own: Forward, group: Group, margins: Margins = ()):
        super().__init__(module, own)
        self.group, self.margins = group, margins

    @torch.no_grad()
    def run(self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: Any, adapter_name: Any = None) -> Any:
        """This rank's columns of both factors (W as the layer keeps it) → the norms (out,)."""
        module: Any = self.module
        weight = weight.T if module.fan_in_fan_out else weight
        if self.margins:
            ranges = weight.split([left + length + right for length, left, right in self.margins], 1)
            sizes = zip(ranges, self.margins, strict=True)
            weight = torch.cat([one.narrow(1, left, length) for one, (length, left, _) in sizes], 1)
        squares = (weight + scaling * lora_weight).float().square().sum(1)
        return self.group.summed(squares).sqrt().to(weight.dtype)


class LocalProduct(WrappedForward):
    """B A of this rank's columns of A: the adapter's own forward would sum A x over the ranks."""

    method = "get_lora_weight"

    @torch.no_grad()
    def run(self, lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: Any = None) -> Any:
        """The adapter's layers → the product (out, in / tp), of which only the norm is taken."""
        return lora_B.weight @ lora_A.weight


class RowMagnitude(WrappedForward):
    """What is added to the output of a row-parallel linear, whose product of a dropped input is summed, too."""

    def run(self, x: torch.Tensor, *, base_layer: nn.Module, base_result: Any = None, **given: Any) -> torch.Tensor:
        """This rank's features (…, in / tp) → what is added (…, out)."""
        if base_result is None:  # there is a dropout before the adapter, and PEFT's formula wants W of what it leaves
            base_result = base_layer(x)
        return self.own(x, base_layer=base_layer, base_result=base_result, **given)


class HeadMagnitude(WrappedForward):
    """What is added to the logits of a head, each rank computing its own columns of it from the whole hidden states.

    Args:
        columns: what makes logits of them.
    """

    def __init__(self, module: nn.Module, own: Forward, columns: VocabularyColumns):
        super().__init__(module, own)
        self.columns = columns

    def run(self, x: torch.Tensor, *, lora_A: Any, lora_B: Any, scaling: Any, base_layer: Any, **_: Any) -> Any:
        """Hidden states (…, width) → logits (…, vocabulary). One product more than PEFT's, which has this one's."""
        module: Any = self.module
        weight = base_layer.weight.to(x.dtype)
        product = (lora_B.weight @ lora_A.weight).detach().to(x.dtype)
        norm = module.get_weight_norm(weight, product, scaling).detach()
        ratio = module.weight / norm.masked_fill(norm == 0, 1)  # rows that only fill up a rank's share
        h, x = regions.copy_all_to_tp([lora_A(x), x], self.columns.vocabulary.group)
        added = (ratio - 1) * F.linear(x, weight) + ratio * F.linear(h, lora_B.weight) * scaling
        return self.columns.of_columns(added)


def install(module: nn.Module, kind: str, group: Group, margins: Margins, columns: VocabularyColumns | None) -> None:
    """Make PEFT's layer of magnitudes at ``module`` one beside a row-parallel linear, an embedding or a head."""
    if kind == "head":
        assert columns is not None
        HeadMagnitude.install(module, columns)
        return
    SummedNorm.install(module, group, margins)
    if kind == "row":
        LocalProduct.install(module)
        RowMagnitude.install(module)
