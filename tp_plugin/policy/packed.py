"""Linears whose weight is kept in codes (bitsandbytes): where the elements of their matrix lie in what is stored.

In 4 bits a matrix (out, in) is stored flat, row after row, with one scale for each block of 64 elements: it can be cut
between blocks. Rows are whole blocks where ``in`` is a multiple of 64. Columns are cut at the nearest edges of blocks
outside of a rank's range; the features of the input that are not its own are zeros there. The scales of 256 blocks may
be in codes themselves; they stay so where every rank's part begins and ends between two such groups.

In 8 bits a matrix is stored as it is, with one scale for each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from tp_plugin.errors import PolicyError
from tp_plugin.policy.layout import ParamLayout, Parts

FOUR_BITS, EIGHT_BITS = "Linear4bit", "Linear8bitLt"
GROUP = 256
"""Blocks whose scales share a scale of their own (``bitsandbytes.functional.quantize_4bit``)."""


def is_packed(module: object) -> bool:
    """Whether ``module`` is a linear with a weight in codes."""
    kind = type(module)  # PEFT's wrappers have the same names
    return kind.__name__ in (FOUR_BITS, EIGHT_BITS) and kind.__module__.startswith("bitsandbytes.")


@dataclass(frozen=True)
class FlatLayout(ParamLayout):
    """How a tensor lies that keeps a matrix flat.

    Attributes:
        shape: of the flat tensor: its length, and maybe ones.
        stored: how the matrix of stored elements lies.
        decoded: how the matrix that the layer computes with is cut, if the tensor stands for one.
    """

    stored: ParamLayout = field(default_factory=lambda: ParamLayout((), None, ((),)))
    decoded: ParamLayout | None = None

    @staticmethod
    def of(shape: tuple[int, ...], stored: ParamLayout, decoded: ParamLayout | None = None) -> FlatLayout:
        """The layout of a tensor of ``shape``, whose dimension 0 alone is longer than 1."""
        dim = 0 if stored.is_sharded else None
        return FlatLayout(shape, dim, stored.parts, absent=stored.absent, stored=stored, decoded=decoded)

    def __post_init__(self) -> None:
        if math.prod(self.shape) != math.prod(self.stored.shape):
            raise ValueError(f"a tensor of {self.shape} cannot keep a matrix of {self.stored.shape}")

    @property
    def features(self) -> ParamLayout:
        """How the matrix that the layer computes with is cut."""
        return self.decoded or self

    def on_stages(self, stages: Sequence[int], count: int) -> FlatLayout:
        """The layout over the ranks of a unit of ``count`` stages, of a tensor that lies so on these ``stages``."""
        decoded = self.decoded and self.decoded.on_stages(stages, count)
        return FlatLayout.of(self.shape, self.stored.on_stages(stages, count), decoded)

    @cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """None: what several ranks hold of codes is never trained, so there is nothing to sum or to bring together."""
        return ()

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the flat tensor that ``rank`` holds."""
        return (math.prod(self.stored.local_shape(rank)), *self.shape[1:])

    def shard(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of ``whole`` that ``rank`` holds, in memory of its own."""
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"expected a tensor of shape {self.shape}, got {tuple(whole.shape)}")
        return self.stored.shard(whole.reshape(self.stored.shape), rank).reshape(self.local_shape(rank))

    def place(self, whole: torch.Tensor, shard: torch.Tensor, rank: int) -> None:
        """Write what ``rank`` holds into its place in ``whole``."""
        self.stored.place(whole.view(self.stored.shape), shard.reshape(self.stored.local_shape(rank)), rank)


def codes_layout(module: Any, dim: int | None, parts: Parts) -> ParamLayout:
    """The layout of the weight of ``module``, whose matrix (out, in) is split along ``dim``, if it is.

    Raises:
        PolicyError: no rank's part of the codes could be decoded by itself.
    """
    matrix = ParamLayout((module.out_features, module.in_features), dim, parts)
    if type(module).__name__ == EIGHT_BITS:
        if module.state.has_fp16_weights:
            raise PolicyError("llm_int8_has_fp16_weight=True trains weights in 16 bits, which it quantizes anew")
        return matrix
    block = block_size(module)
    refuse_ragged(module, block)
    out, width = matrix.shape
    weight = module.weight
    elements = out * width // weight.numel()  # in one stored number: two codes a byte, and numbers may be wider
    stored = ParamLayout((out, width // elements), dim, _scaled(matrix, block, elements))
    return FlatLayout.of(tuple(weight.shape), stored, matrix)


def refuse_ragged(module: Any, block: int) -> None:
    """Raise if blocks run across the rows of a matrix in 4 bits."""
    if module.in_features % block:
        raise PolicyError(
            f"its in_features ({module.in_features}) are no multiple of {block}, so blocks of its 4-bit codes run "
            "across its rows, and no rank's rows can be decoded alone (bitsandbytes' CPU kernels decode some of them "
            "wrongly, too); leave it in 16 bits (llm_int8_skip_modules), or quantize to 8 bits (load_in_8bit)"
        )


def block_size(module: Any) -> int:
    """Elements of a 4-bit matrix that share a scale."""
    return int(module.weight.blocksize)


def scales_layout(features: ParamLayout, block: int) -> FlatLayout:
    """How the scales of the blocks lie: one number each, flat."""
    out, width = features.shape
    parts = _scaled(features, block, block)
    stored = ParamLayout((out, width // block), features.dim, parts, absent=features.absent)
    return FlatLayout.of((out * width // block,), stored)


def groups_layout(features: ParamLayout, block: int) -> ParamLayout | None:
    """How the scales of the scales lie; None if one of them belongs to blocks of several ranks."""
    out, width = features.shape
    group = GROUP * block
    edges = {edge * width for part in features.parts for r in part for edge in r} - {out * width}
    if features.dim != 0 or any(edge % group for edge in edges):
        return None
    parts = tuple(tuple((a * width // group, -(-b * width // group)) for a, b in part) for part in features.parts)
    return ParamLayout((-(-out * width // group),), 0, parts, absent=features.absent)


def margins(layout: ParamLayout, rank: int) -> tuple[tuple[int, int, int], ...]:
    """For each range of input features of ``rank``: how many there are, and of the others in the codes around it.

    Empty where the codes hold these features and no others.
    """
    if not isinstance(layout, FlatLayout) or layout.features.dim != 1:
        return ()
    mine, elements = layout.features.parts[rank], layout.features.shape[1] // layout.stored.shape[1]
    held = [(a * elements, b * elements) for a, b in layout.stored.parts[rank]]
    found = tuple((b - a, a - first, last - b) for (a, b), (first, last) in zip(mine, held, strict=True))
    return found if any(left or right for _, left, right in found) else ()


def _scaled(matrix: ParamLayout, block: int, elements: int) -> Parts:
    """The parts of a matrix with ``elements`` columns of this one in each of its own, at the edges of blocks."""
    if matrix.dim != 1:
        return matrix.parts
    return tuple(
        tuple((a // block * block // elements, -(-b // block) * block // elements) for a, b in part)
        for part in matrix.parts
    )
