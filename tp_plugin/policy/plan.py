"""What a policy means for one model: plain data, by module path and parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tp_plugin.policy.layout import ParamLayout, Parts, Range
from tp_plugin.policy.split import HeadSplit


@dataclass
class BlockPlan:
    """One block of a model. Paths are whole paths in the model.

    Attributes:
        inputs: names of the arguments of the forward of ``entry`` at which it begins (``*``: all differentiable ones).
        entry: path of the module whose arguments those are.
        heads: which heads each rank computes, of attention.
        folded_heads: whether its dropout acts on (batch · heads, q, k), not on (batch, heads, q, k).
        input_of, output_of: paths of modules at whose input or output it begins otherwise.
        columns, rows: paths of its column- and its row-parallel modules (without adapters').
        head_inputs: argument → its dimension of heads, their number, and each rank's range.
        output_is_partial: whether the output of the block's module is a partial sum, which the block reduces.
        bias_shards: names of its module's biases that are split by output features.
        experts: the argument with the experts' numbers, and each rank's range of whole experts (expert parallelism).
    """

    inputs: tuple[str, ...]
    entry: str
    heads: HeadSplit | None = None
    folded_heads: bool = False
    input_of: tuple[str, ...] = ()
    output_of: tuple[str, ...] = ()
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    head_inputs: dict[str, tuple[int, int, tuple[Range, ...]]] = field(default_factory=dict)
    output_is_partial: bool = False
    bias_shards: tuple[str, ...] = ()
    experts: tuple[str, tuple[Range, ...]] | None = None


@dataclass(frozen=True)
class AdapterPlan:
    """How PEFT's layer of a method other than LoRA computes beside a split linear (adapters.py).

    Attributes:
        shape: (out, in) of the whole linear.
        size: its features along the dimension that is split.
        parts: each rank's ranges of these.
        buffers: attributes with buffers of which this rank computes with a part → the dimension.
        results: methods of whose results this rank takes a part → of each result the dimension (None: all of it).
        by_delta: the layer computes with ``get_delta_weight``.
        summed: what the layer gives is summed over the ranks, not what its linear gives.
    """

    shape: tuple[int, int]
    size: int
    parts: Parts
    buffers: Mapping[str, int]
    results: Mapping[str, tuple[int | None, ...]]
    by_delta: bool
    summed: bool


@dataclass
class Plan:
    """What sharding one model on ``tp`` ranks means, by module path and parameter name.

    Attributes:
        tp: TP size.
        layouts: layout of every parameter, tied names included.
        blocks: path → how the block communicates.
        parallel_residual: path of a layer → paths of its two blocks that communicate as one.
        rows: paths of row-parallel modules.
        columns: paths of column-parallel modules.
        partial: names of replicated parameters whose gradient must be summed over the TP group.
        attributes: (path, attribute) → its value on each rank; the attribute may be dotted.
        methods: (path, name) → the function that takes the place of this method on every rank.
        sharded_norms: path of a norm over a sharded width → its whole width.
        embeddings, heads: paths of vocabulary-parallel modules.
        adapted_embeddings: (path, name) of LoRA adapters around embeddings.
        adapters: path of PEFT's layer of another method → how it computes, if not as on one process.
        magnitudes: path of DoRA's magnitudes → "row", "embedding" or "head", if that makes a difference.
        unproven: model types (the model's, its towers') whose policy was derived and is proven by no test.
        dropouts: paths of dropouts inside or beside a block that follow their input → is it "replicated" or "sharded".
    """

    tp: int
    layouts: dict[str, ParamLayout] = field(default_factory=dict)
    blocks: dict[str, BlockPlan] = field(default_factory=dict)
    parallel_residual: dict[str, tuple[str, str]] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    partial: set[str] = field(default_factory=set)
    attributes: dict[tuple[str, str], tuple[int | bool, ...]] = field(default_factory=dict)
    methods: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)
    sharded_norms: dict[str, int] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    adapted_embeddings: list[tuple[str, str]] = field(default_factory=list)
    adapters: dict[str, AdapterPlan] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    dropouts: dict[str, str] = field(default_factory=dict)
    unproven: list[str] = field(default_factory=list)

    def query_heads(self, path: str) -> Parts:
        """Each rank's query heads of the attention at ``path``, as ranges in the order of the whole model's."""
        block = self.blocks[path]
        assert block.heads is not None
        if not block.rows:
            return tuple((held,) for held in block.heads.q)
        layout = self.layouts[f"{block.rows[0]}.weight"].features  # its input is the concatenated outputs of the heads
        assert layout.dim is not None
        width = layout.shape[layout.dim] // block.heads.q_heads
        return tuple(tuple((a // width, b // width) for a, b in part) for part in layout.parts)

    def key_heads(self, path: str) -> Parts:
        """The same for key/value heads, of which ranks may share one."""
        heads = self.blocks[path].heads
        assert heads is not None
        return self.query_heads(path) if heads.q_heads == heads.kv_heads else tuple((held,) for held in heads.kv)

    def sharded_share(self, parameters: Mapping[str, torch.Tensor]) -> float:
        """Share of the parameters' elements that is really split (0…1)."""
        numel = {name: p.numel() for name, p in parameters.items()}
        return sum(n for name, n in numel.items() if self.layouts[name].is_sharded) / max(1, sum(numel.values()))

    def reductions(self, below: str = "") -> tuple[int, int]:
        """All-reduces of activations in the forward and in the backward, of all or of the blocks of one layer.

        If each module runs once; one less in the backward for each parallel residual whose blocks share their input.
        There are smaller ones: :meth:`gradient_sums`, and two of a number per token for each sharded norm.
        """
        blocks = [block for path, block in self.blocks.items() if f"{path}.".startswith(below)]
        begun = sum(1 if block.inputs else len(block.input_of) + len(block.output_of) for block in blocks)
        summed = len(blocks) - sum(f"{path}.".startswith(below) for path in self.parallel_residual)
        if below:
            return summed, begun
        return summed + len(self.embeddings), begun + len(self.heads)

    def gradient_sums(self) -> list[str]:
        """Names of parameters whose values every rank holds, all or some of them, but only a partial gradient."""
        everyone = tuple(range(self.tp))
        shared = {name for name, layout in self.layouts.items() if everyone in layout.replica_groups}
        return sorted(self.partial | shared)
