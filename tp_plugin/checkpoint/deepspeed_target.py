"""The DeepSpeed files of a rank in a run of another tp, dp or layout, made from a saved checkpoint."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tp_plugin.checkpoint.deepspeed_layout import SIDECAR, FlatSlice, GroupShapes, base_optimizer_state, flat_groups
from tp_plugin.checkpoint.deepspeed_source import DeepSpeedCheckpoint
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout


@dataclass
class TargetRank:
    """The rank for which a checkpoint is rewritten.

    Attributes:
        tp, dp: the sizes of its run.
        tp_rank, dp_rank: its place in them.
        layouts: how the run splits parameters, by name; one that is not named is replicated.
        group_shapes: local shapes of its optimizer's flat groups; None to keep the checkpoint's grouping.
    """

    tp: int
    dp: int
    tp_rank: int
    dp_rank: int
    layouts: Mapping[str, ParamLayout]
    group_shapes: GroupShapes | None = None

    def shard(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a full tensor."""
        layout = self.layouts.get(name)
        return full if layout is None or not layout.is_sharded else layout.shard(full, self.tp_rank)

    def local_shape(self, name: str, full: Iterable[int]) -> tuple[int, ...]:
        """The shape of what this rank holds of a tensor of shape ``full``."""
        layout = self.layouts.get(name)
        return tuple(full) if layout is None else layout.local_shape(self.tp_rank)


def model_file(source: DeepSpeedCheckpoint, target: TargetRank) -> dict[str, Any]:
    """The contents of the target rank's ``model_states`` file.

    Raises:
        TPError: the optimizer in it (without ZeRO) cannot be resharded.
    """
    first = source.model_state(0)
    state = dict(first)
    state["dp_world_size"], state["mp_world_size"] = target.dp, target.tp
    if "checkpoint_parallel_dimensions" in state:
        state["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": target.tp}
    if source.stage != 3:
        state["module"] = OrderedDict((key, target.shard(key, source.full_weight(key))) for key in first["module"])
    if not source.stage:
        state["optimizer"] = _unpartitioned_optimizer(source, target)
        return state
    groups = _group_shapes(source, target)
    state["param_shapes"] = [OrderedDict((n, torch.Size(shape)) for n, shape in group.items()) for group in groups]
    frozen = _not_optimized(source, target, groups)
    if frozen or first.get("frozen_param_shapes"):
        shapes, fragments = OrderedDict(), OrderedDict()
        for name, is_absent in frozen.items():
            local = torch.empty(target.layouts[name].local_shape(target.tp_rank), device="cpu") if is_absent else None
            local = target.shard(name, source.full_frozen(name)) if local is None else local
            shapes[name] = torch.Size(local.shape)
            fragments[name] = local
            if source.stage == 3:
                ((length, slices),) = flat_groups([{name: tuple(local.shape)}], 3, target.dp, target.dp_rank)
                fragments[name] = _fill(length, slices, {name: local}.__getitem__, local.dtype)
        state["frozen_param_shapes"] = shapes
        if first.get("frozen_param_fragments") is not None:
            state["frozen_param_fragments"] = fragments
    return state


def optimizer_file(source: DeepSpeedCheckpoint, target: TargetRank) -> dict[str, Any]:
    """The contents of the target rank's ``optim_states`` file under ZeRO.

    Raises:
        TPError: the checkpoint pads single parameters, or was saved for an elastic world.
    """
    template = source.partition(0, 0)
    if any(any(pads) for pads in template.get("param_alignment_paddings") or []):
        raise TPError("the checkpoint pads single parameters (param_alignment_paddings), which is not supported")
    shapes = _group_shapes(source, target)
    groups = flat_groups(shapes, source.stage, target.dp, target.dp_rank)
    saved_group = {name: g for g, group in enumerate(source.group_shapes) for name in group}
    base = base_optimizer_state(template)
    states, masters = {}, []
    for number, (length, slices) in enumerate(groups):

        def rank_partition(key: str, length: int = length, slices: list[FlatSlice] = slices) -> torch.Tensor:
            return _fill(length, slices, lambda name: target.shard(name, source.full_trained(name, key)))

        masters.append(rank_partition("fp32"))
        group = saved_group[slices[0].name] if slices else min(number, len(base["state"]) - 1)
        per_element = source.state_keys(group)
        states[number] = {
            key: rank_partition(key) if key in per_element else value
            for key, value in base["state"].get(group, {}).items()
        }
    partition = dict(template)
    if source.stage == 3:
        partition |= {
            "optimizer_state_dict": {**base, "state": states},
            "fp32_flat_groups": masters,
            "partition_count": target.dp,
        }
    else:
        numels = [sum(math.prod(shape) for shape in group.values()) for group in shapes]
        is_last = target.dp_rank == target.dp - 1
        partition |= {
            "base_optimizer_state": {**base, "state": states},
            "single_partition_of_fp32_groups": masters,
            "partition_count": [target.dp] * len(groups),
            "group_paddings": [
                length * target.dp - numel if is_last else 0 for (length, _), numel in zip(groups, numels, strict=True)
            ],
            "param_slice_mappings": [_slice_mapping(slices) for _, slices in groups],
        }
        if template.get("param_alignment_paddings") is not None:
            partition["param_alignment_paddings"] = [[0] * len(group) for group in shapes]
    return {**source.optimizer_file(0, 0), "optimizer_state_dict": partition}


def _not_optimized(source: DeepSpeedCheckpoint, target: TargetRank, groups: GroupShapes) -> dict[str, bool]:
    """What DeepSpeed keeps among the frozen parameters, and whether only for having no elements on the target rank."""
    trained = {name for group in source.group_shapes for name in group}
    own = {name for group in groups for name in group}
    frozen = {n: False for n in source.model_state(0).get("frozen_param_shapes") or {} if n not in trained}
    return frozen | {name: True for name in trained if name not in own}


def _group_shapes(source: DeepSpeedCheckpoint, target: TargetRank) -> GroupShapes:
    if target.group_shapes is not None:
        return target.group_shapes
    return [
        {name: target.local_shape(name, source.layout(name, shape).shape) for name, shape in group.items()}
        for group in source.group_shapes
    ]


def _fill(
    length: int, slices: list[FlatSlice], local: Callable[[str], torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A flat tensor of ``length`` with those slices of the flattened ``local(name)``, and zeros elsewhere.

    Args:
        dtype: of a tensor without any slice; others are in the dtype of ``local(name)``.
    """
    flat: torch.Tensor | None = None
    for piece in slices:
        if piece.length:
            elements = local(piece.name).reshape(-1)
            flat = elements.new_zeros(length) if flat is None else flat
            flat[piece.offset : piece.offset + piece.length] = elements[piece.start : piece.start + piece.length]
    return torch.zeros(length, dtype=dtype, device="cpu") if flat is None else flat


def _slice_mapping(slices: list[FlatSlice]) -> OrderedDict[str, Any]:
    from deepspeed.utils.tensor_fragment import fragment_address

    return OrderedDict((piece.name, fragment_address(start=piece.offset, numel=piece.length)) for piece in slices)


def _unpartitioned_optimizer(source: DeepSpeedCheckpoint, target: TargetRank) -> Any:
    """The optimizer of a run without ZeRO: its own ``state_dict``, or that within DeepSpeed's 16-bit wrapper."""
    saved = [source.model_state(t)["optimizer"] for t in range(source.tp)]
    if saved[0] is None:
        return None
    if "fp32_groups_flat" in saved[0]:
        raise TPError(
            "the checkpoint holds the flat groups of DeepSpeed's fused 16-bit optimizer without ZeRO, which are not "
            "resharded; save with ZeRO stage 1, which trains the same"
        )
    if source.optimizer_names is None:
        raise TPError(f"{source.folder} was saved without ZeRO and without {SIDECAR}: its parameters are not named")
    names = [name for group in source.optimizer_names for name in group]
    inner = [one.get("optimizer_state_dict", one) for one in saved]

    def convert(name: str, shards: list[Any]) -> Any:
        if not isinstance(shards[0], torch.Tensor):
            return shards[0]
        layout = source.layouts.get(name)
        like_parameter = layout is None or all(tuple(s.shape) == layout.local_shape(t) for t, s in enumerate(shards))
        if not shards[0].dim() or not like_parameter:
            return shards[0]
        return target.shard(name, shards[0] if layout is None else layout.gather(shards))

    numbers = [number for group in inner[0]["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, names, strict=True))
    state = {
        number: {key: convert(name_of[number], [one["state"][number][key] for one in inner]) for key in entry}
        for number, entry in inner[0]["state"].items()
    }
    converted = {**inner[0], "state": state}
    if "optimizer_state_dict" not in saved[0]:
        return converted
    masters = [
        [convert(name, [one["fp32_groups"][g][i].detach() for one in saved]) for i, name in enumerate(group)]
        for g, group in enumerate(source.optimizer_names)
    ]
    return {**saved[0], "optimizer_state_dict": converted, "fp32_groups": masters}
