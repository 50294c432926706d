"""Plan + model → the objects that compute in parallel: blocks, stacks of layers, vocabulary; and modules made to fit.

Nothing is hooked here: which of their methods runs when is the table in hooks.py.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.policy import BlockPlan, ParamLayout, Plan
from tp_plugin.policy.layout import Range
from tp_plugin.policy.lora import is_adapted
from tp_plugin.policy.packed import margins
from tp_plugin.tensor import adapters, back_to_back, dora
from tp_plugin.tensor.block import ParallelBlock
from tp_plugin.tensor.dropout import FollowingDropout
from tp_plugin.tensor.embedding import AdaptedRows, ParallelEmbeddingForward, VocabularyRows
from tp_plugin.tensor.experts import ExpertBiasForward
from tp_plugin.tensor.linear import ColumnParallelForward, RowParallelForward, fit_sizes, takes_overlap
from tp_plugin.tensor.norm import TPRMSNorm
from tp_plugin.tensor.outputs import LayerOutputs
from tp_plugin.tensor.parallel_residual import ParallelResidual
from tp_plugin.tensor.peer_reads import PeerReads
from tp_plugin.tensor.sequence import LayerRegion, Stack
from tp_plugin.tensor.vocab import FusedForward, Vocabulary, VocabularyColumns
from tp_plugin.tensor.wgrad_overlap import BlockInput
from tp_plugin.tensor.whole_masks import CutFeatures, CutHeads, Cuts


@dataclass
class StackOfLayers:
    """A stack under sequence parallelism, the paths of its layers in order, and each layer's random stream."""

    stack: Stack
    layers: list[str]
    regions: dict[str, LayerRegion]


@dataclass
class Parts:
    """The objects of one sharded model, by the path of the module they belong to.

    Attributes:
        our_hooks: ids of the handles of all hooks that this plugin puts on the model (hooks.py fills it).
    """

    blocks: dict[str, ParallelBlock] = field(default_factory=dict)
    dropouts: dict[str, FollowingDropout] = field(default_factory=dict)
    residuals: dict[str, ParallelResidual] = field(default_factory=dict)
    stacks: list[StackOfLayers] = field(default_factory=list)
    outputs: dict[str, LayerOutputs] = field(default_factory=dict)
    heads: dict[str, VocabularyColumns] = field(default_factory=dict)
    our_hooks: set[int] = field(default_factory=set)


def build_parts(
    model: nn.Module, plan: Plan, stacks: Mapping[str, list[str]], group: Group, peers: PeerReads, options: RunConfig
) -> Parts:
    """Make them, and fit the modules' sizes and forwards to this rank's shards.

    Args:
        stacks: path of a stack → paths of its layers, where sequence parallelism is on.
        group: the TP group.
        peers: how logits are read that other ranks hold.
    """
    parts = Parts()
    _fit_modules(model, plan, group)
    for path, planned in plan.blocks.items():
        parts.blocks[path] = _block(model, path, planned, plan, group, options)
    for path, kind in plan.dropouts.items():
        nearest = max((block for block in plan.blocks if path.startswith(block + ".")), key=len)
        features = _features(plan.blocks[nearest], plan, group) if options.dropout == "exact" else None
        parts.dropouts[path] = FollowingDropout(path, kind, parts.blocks[nearest], features)
    for path, pair in plan.parallel_residual.items():
        parts.residuals[path] = _residual(model, path, pair, plan, parts, group)
    if options.overlap or options.fuse:
        for path, planned in plan.blocks.items():
            _overlap(model, planned, plan, parts.blocks[path].block_input, options)
    for path, layers in stacks.items():
        parts.stacks.append(_stack(path, layers, parts, group, options))
    parts.outputs = _outputs(model, plan, parts, group)
    _vocabulary(model, plan, parts, group, peers, options)
    for path, adapter in plan.adapters.items():
        adapters.install(model.get_submodule(path), adapter, group.rank)
    for path, kind in plan.magnitudes.items():
        base = f"{path.rpartition('.lora_magnitude_vector.')[0]}.base_layer"
        around = margins(plan.layouts[f"{base}.weight"], group.rank)
        dora.install(model.get_submodule(path), kind, group, around, parts.heads.get(base))
    return parts


def _fit_modules(model: nn.Module, plan: Plan, group: Group) -> None:
    for path in (*plan.columns, *plan.rows):
        fit_sizes(model.get_submodule(path), plan.layouts[f"{path}.weight"].features, group.rank)
    for (path, attribute), values in plan.attributes.items():
        *owners, name = attribute.split(".")
        owner: Any = model.get_submodule(path)
        for inner in owners:
            if inner == "config":  # shared by the whole model: this module gets its own
                owner.config = copy.copy(owner.config)
            owner = getattr(owner, inner)
        setattr(owner, name, values[group.rank])
    for (path, name), function in plan.methods.items():
        setattr(model.get_submodule(path), name, function)
    for path, width in plan.sharded_norms.items():
        layout = plan.layouts[f"{path}.weight"]
        TPRMSNorm.install(model.get_submodule(path), width, layout.owned(group.rank), group)


def _block(
    model: nn.Module, path: str, planned: BlockPlan, plan: Plan, group: Group, options: RunConfig
) -> ParallelBlock:
    signature = inspect.signature(model.get_submodule(planned.entry).forward)
    positions = {name: at for at, name in enumerate(signature.parameters)}
    cuts: Cuts | None = None
    if options.dropout == "exact" and planned.heads is not None:
        cuts = CutHeads(plan.query_heads(path), group.rank, planned.folded_heads)
    elif options.dropout == "exact":
        cuts = _features(planned, plan, group)
    block = ParallelBlock(path, planned, positions, group, cuts)
    if planned.bias_shards:
        layouts = {name: plan.layouts[f"{path}.{name}"] for name in planned.bias_shards}
        held = {name: (layout.parts[group.rank][0], layout.shape[-1]) for name, layout in layouts.items()}
        ExpertBiasForward.install(model.get_submodule(path), held)
    for row in planned.rows:
        RowParallelForward.install(model.get_submodule(row), block, margins(plan.layouts[f"{row}.weight"], group.rank))
    return block


def _features(planned: BlockPlan, plan: Plan, group: Group) -> Cuts:
    """How the inputs of a block's row-parallel linears are split."""
    inputs = dict.fromkeys(plan.layouts[f"{row}.weight"].parts for row in planned.rows)
    return CutFeatures(tuple(inputs), group.rank)


def _residual(
    model: nn.Module, path: str, pair: tuple[str, str], plan: Plan, parts: Parts, group: Group
) -> ParallelResidual:
    rows = [plan.blocks[block].rows[0] for block in pair]
    outputs = [model.get_submodule(out) for out in sorted({*pair, *rows})]
    adapted = any(is_adapted(model.get_submodule(row.rpartition(".")[0])) for row in rows)
    shared = BlockInput(group)
    residual = ParallelResidual(path, outputs, shared, group, parts.our_hooks, adapted)
    for name in pair:
        parts.blocks[name].residual, parts.blocks[name].block_input = residual, shared
    return residual


def _overlap(model: nn.Module, planned: BlockPlan, plan: Plan, block_input: BlockInput, options: RunConfig) -> None:
    """Tell column-parallel linears of the input of their block, and put weights that may run as one back to back."""
    block_input.overlap, block_input.fuse = options.overlap, options.fuse
    linears: list[Any] = [model.get_submodule(column) for column in planned.columns]
    linears = [linear for linear in linears if takes_overlap(linear)]
    for linear in linears:
        ColumnParallelForward.install(linear, block_input)
    block_input.linears += linears
    sharded = all(plan.layouts[f"{column}.weight"].is_sharded for column in planned.columns)
    alike = len({(type(linear), linear.weight.shape[1], linear.bias is None) for linear in linears}) == 1
    if not (options.fuse and planned.inputs and len(planned.columns) == len(linears) > 1 and sharded and alike):
        return
    weights = [linear.weight for linear in linears]
    if not isinstance(linears[0], Conv1D) and len({(w.dtype, w.device) for w in weights}) == 1:
        back_to_back.put_back_to_back(weights)
        block_input.siblings.append(tuple(linears))


def _stack(path: str, layers: list[str], parts: Parts, group: Group, options: RunConfig) -> StackOfLayers:
    stack = Stack(path, group)
    exact = options.dropout == "exact"
    regions = {layer: LayerRegion(layer, stack, group.rank, exact) for layer in layers}
    for layer, region in regions.items():
        for name, block in parts.blocks.items():
            if name == layer or name.startswith(f"{layer}."):
                block.stack, block.layer_region = stack, region.region
                if block.residual is not None:
                    block.residual.stack = stack
    return StackOfLayers(stack, layers, regions)


def _outputs(model: nn.Module, plan: Plan, parts: Parts, group: Group) -> dict[str, LayerOutputs]:
    """What gathers what the nearest model around the layers returns of them."""
    from transformers import PreTrainedModel

    around: list[str] = [
        path for path, module in model.named_modules() if not path or isinstance(module, PreTrainedModel)
    ]

    def nearest(path: str) -> str:
        return max((a for a in around if f"{path}.".startswith(f"{a}." if a else "")), key=len)

    found = {}
    for owner in around:
        attentions = [path for path, block in plan.blocks.items() if block.heads is not None and nearest(path) == owner]
        heads = [plan.query_heads(path) for path in attentions]
        split = [one.stack for one in parts.stacks if nearest(one.stack.path) == owner]
        if heads or split:
            found[owner] = LayerOutputs(heads, split, group)
    return found


def _vocabulary(model: nn.Module, plan: Plan, parts: Parts, group: Group, peers: PeerReads, options: RunConfig) -> None:
    for path in plan.embeddings:
        embedding, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            raise TPError(f"{path} must be an nn.Embedding without max_norm to be split by vocabulary rows")
        start, stop = _rows(layout, 0, group.rank)
        rows = VocabularyRows(layout.shape[0], start, stop, embedding.padding_idx, group)
        ParallelEmbeddingForward.install(embedding, rows)
        embedding.num_embeddings = layout.local_shape(group.rank)[0]
    for path, name in plan.adapted_embeddings:
        adapted: Any = model.get_submodule(path)
        layout = plan.layouts[f"{path}.lora_embedding_A.{name}"]
        start, stop = _rows(layout, 1, group.rank)
        padding = adapted.get_base_layer().padding_idx
        adapted._embed = AdaptedRows(VocabularyRows(layout.shape[1], start, stop, padding, group))
    for path in plan.heads:
        head, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        fit_sizes(head, layout, group.rank)
        vocabulary = Vocabulary(layout.shape[0], layout.local_shape(group.rank)[0], group, peers)
        parts.heads[path] = VocabularyColumns(vocabulary)
        if options.fused_head:
            FusedForward.install(head, vocabulary)


def _rows(layout: ParamLayout, dim: int, rank: int) -> Range:
    """The vocabulary entries of a rank; the last ranks may have none."""
    size = layout.shape[dim]
    return layout.parts[rank][0] if layout.parts[rank] else (size, size)
