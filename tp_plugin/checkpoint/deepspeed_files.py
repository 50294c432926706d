"""DeepSpeed's checkpoint files, read as whole tensors and rewritten for another tp and dp. No torch.distributed.

A checkpoint is a folder (the *tag*) with, for TP rank t and DP rank d (deepspeed/runtime/engine.py, zero/*.py, 0.19):

    mp_rank_<t>_model_states.pt                       weights, counters, scheduler; without ZeRO the optimizer
    [bf16_]zero_pp_rank_<d>_mp_rank_<t>_optim_states.pt   ZeRO: a partition of flat fp32 weights and optimizer states
    zero_pp_rank_<d>_mp_rank_<t>_model_states.pt      ZeRO-3 instead of the first: placeholders and frozen partitions
    tp_plugin.json                                    ours: the layout of every parameter, the optimizer's names

Stages 1 and 2 concatenate a group's parameters, pad to a multiple of 2·dp and cut into dp partitions. Stage 3 cuts each
parameter into dp pieces of ceil(numel / dp) and concatenates a rank's pieces.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout

SIDECAR = "tp_plugin.json"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

Shapes = list[dict[str, tuple[int, ...]]]
"""For each flat group of an optimizer, its parameters' local shapes by name, in order."""


@dataclass(frozen=True)
class Slot:
    """Elements ``[begin, begin + count)`` of a flat parameter lie at ``at`` in a rank's flat group."""

    name: str
    begin: int
    count: int
    at: int


def partitions(shapes: Shapes, stage: int, dp: int, rank: int) -> list[tuple[int, list[Slot]]]:
    """Length and contents of each flat group of DP rank ``rank`` under ZeRO ``stage`` 1, 2 or 3."""
    groups = []
    for group in shapes:
        slots, at, position = [], 0, 0
        if stage == 3:
            for name, shape in group.items():
                piece = math.ceil(math.prod(shape) / dp)
                begin = min(rank * piece, math.prod(shape))
                slots.append(Slot(name, begin, min(piece, math.prod(shape) - begin), at))
                at += piece
            groups.append((at, slots))
            continue
        length = math.ceil(sum(math.prod(shape) for shape in group.values()) / (2 * dp)) * 2
        low, high = rank * length, (rank + 1) * length
        for name, shape in group.items():
            start, stop = max(position, low), min(position + math.prod(shape), high)
            if start < stop:
                slots.append(Slot(name, start - position, stop - start, start - low))
            position += math.prod(shape)
        groups.append((length, slots))
    return groups


class Checkpoint:
    """One saved checkpoint, of any tp and dp, seen as whole tensors.

    Args:
        folder: the tag's folder.
        optimizer_names: names of the optimizer's parameters per group, for a checkpoint without ZeRO and without our
            sidecar (its optimizer state is by number).

    Raises:
        TPError: a file is missing, truncated or of another kind; the message names it.
    """

    def __init__(self, folder: Path, optimizer_names: list[list[str]] | None = None):
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._last: tuple[Any, torch.Tensor] | None = None
        self._model_files = _by_rank(folder, _MODEL)
        self._optimizer_files = _by_rank(folder, _OPTIMIZER)
        if (0, 0) not in self._model_files:
            raise TPError(f"{folder} holds no DeepSpeed checkpoint: no *mp_rank_00_model_states.pt in it")
        self.sidecar = self._read_sidecar()
        first = self.model_state(0)
        missing = [key for key in ("module", "mp_world_size", "dp_world_size", "ds_config") if key not in first]
        if missing:
            raise TPError(f"{self._model_files[0, 0]} is no DeepSpeed checkpoint: it has no key {missing[0]!r}")
        self.tp, self.dp = int(first["mp_world_size"]), int(first["dp_world_size"])
        self.layouts = layouts_from(self.sidecar.get("layouts", {}))
        if self.tp > 1 and not self.sidecar:
            raise TPError(
                f"{folder} was saved with a model-parallel size of {self.tp} and has no {SIDECAR}; how its tensors "
                "were split is not known"
            )
        self.optimizer_names = self.sidecar.get("optimizer_names") or optimizer_names
        self.stage = self._stage()
        self._check_complete()

    def _read_sidecar(self) -> dict[str, Any]:
        path = self.folder / SIDECAR
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        except ValueError as error:
            raise TPError(f"{path} is damaged: {error}") from error

    def _stage(self) -> int:
        if not self._optimizer_files:
            return 0
        return 3 if "fp32_flat_groups" in self.optimizer_state(0, 0) else int(self.optimizer_state(0, 0)["zero_stage"])

    def _check_complete(self) -> None:
        stem = (
            "zero_pp_rank_{d}_mp_rank_{t:02d}_model_states.pt" if self.stage == 3 else "mp_rank_{t:02d}_model_states.pt"
        )
        for t in range(self.tp):
            for d in range(self.dp):
                if (t, d if self.stage == 3 else 0) not in self._model_files:
                    raise TPError(f"checkpoint {self.folder} is not complete: {stem.format(t=t, d=d)} is missing")
                if self.stage and (t, d) not in self._optimizer_files:
                    name = f"zero_pp_rank_{d}_mp_rank_{t:02d}_optim_states.pt"
                    raise TPError(f"checkpoint {self.folder} is not complete: {name} is missing")

    def model_state(self, tp_rank: int, dp_rank: int = 0) -> dict[str, Any]:
        """The model file of a rank (shared by all DP ranks below stage 3)."""
        path = self._model_files.get((tp_rank, dp_rank)) or self._model_files.get((tp_rank, 0))
        if path is None:
            raise TPError(f"checkpoint {self.folder} is not complete: no model states of TP rank {tp_rank}")
        return self._load(path)

    def optimizer_state(self, tp_rank: int, dp_rank: int) -> dict[str, Any]:
        """A rank's partition of the optimizer."""
        return self._load(self._optimizer_files[tp_rank, dp_rank])["optimizer_state_dict"]  # type: ignore[no-any-return]

    def _load(self, path: Path) -> dict[str, Any]:
        if path.name not in self._open:
            try:
                self._open[path.name] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                raise TPError(f"checkpoint file {path} cannot be read ({error}); it is truncated or damaged") from error
        return self._open[path.name]  # type: ignore[no-any-return]

    @property
    def shapes(self) -> Shapes:
        """Local shapes (TP rank 0) of the optimizer's flat groups under ZeRO."""
        return [{name: tuple(shape) for name, shape in group.items()} for group in self.model_state(0)["param_shapes"]]

    def layout(self, name: str, shape: Iterable[int]) -> ParamLayout:
        """The layout a parameter was saved in; ``shape`` is used for one that was not sharded."""
        return self.layouts.get(name) or ParamLayout.replicated(tuple(shape), self.tp)

    def weight(self, key: str) -> torch.Tensor:
        """A whole tensor of the model's ``state_dict`` below stage 3."""
        first: torch.Tensor = self.model_state(0)["module"][key]
        layout = self.layout(key, first.shape)
        return layout.gather([self.model_state(t)["module"][key] for t in range(self.tp)])

    def frozen(self, name: str) -> torch.Tensor:
        """A whole parameter that the optimizer does not own."""
        if self.stage != 3:
            return self.weight(name)
        shards = []
        for t in range(self.tp):
            shape = tuple(self.model_state(t)["frozen_param_shapes"][name])
            pieces = [self.model_state(t, d)["frozen_param_fragments"][name].reshape(-1) for d in range(self.dp)]
            shards.append(torch.cat(pieces)[: math.prod(shape)].reshape(shape))
        return self.layout(name, shards[0].shape).gather(shards)

    def trained(self, name: str, key: str) -> torch.Tensor:
        """Whole fp32 weight (``key="fp32"``) or optimizer state of a parameter under ZeRO 1, 2 or 3."""
        if self._last is None or self._last[0] != (name, key):
            shards = [self._local(name, key, t) for t in range(self.tp)]
            self._last = ((name, key), self.layout(name, shards[0].shape).gather(shards))
        return self._last[1]

    def _local(self, name: str, key: str, tp_rank: int) -> torch.Tensor:
        groups = self.model_state(tp_rank)["param_shapes"]
        number = next((g for g, group in enumerate(groups) if name in group), None)
        if number is None:
            raise TPError(f"checkpoint {self.folder} has no optimizer state of parameter {name!r}")
        shape = tuple(groups[number][name])
        layout = [{n: tuple(s) for n, s in groups[number].items()}]
        pieces = []
        for d in range(self.dp):
            flat = flat_tensor(self.optimizer_state(tp_rank, d), number, key)
            ((_, slots),) = partitions(layout, self.stage, self.dp, d)
            pieces += [flat[slot.at : slot.at + slot.count] for slot in slots if slot.name == name]
        return torch.cat(pieces).reshape(shape)

    def state_keys(self, group: int = 0) -> list[str]:
        """Names of the per-element optimizer states (``exp_avg`` …) of a flat group under ZeRO."""
        partition = self.optimizer_state(0, 0)
        length = flat_tensor(partition, group, "fp32").numel()
        return [key for key, value in base_state(partition)["state"][group].items() if is_flat(value, length)]

    @property
    def aliases(self) -> dict[str, str]:
        """Names that are another parameter's second name (tied weights), with the first one."""
        return self.sidecar.get("aliases") or dict(self.model_state(0).get("shared_params") or {})

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole model as fp32 masters (what ``zero_to_fp32`` gives): trained, frozen, buffers, tied names."""
        state = self.model_state(0)
        names = list(state["module"])
        trained = self._masters_by_name()
        for key in names:
            if key in trained:
                yield key, trained[key]()
            elif self.stage == 3 and key in (state["frozen_param_shapes"] or {}):
                yield key, self.frozen(key).float()
            elif self.stage == 3 and key not in state["buffer_names"]:
                owner = self.aliases.get(key)
                if owner is None:
                    raise TPError(f"checkpoint {self.folder} has no data of {key!r}")
                yield key, trained[owner]()
            else:
                yield key, self.weight(key)

    def _masters_by_name(self) -> dict[str, Any]:
        if self.stage:
            return {n: (lambda n=n: self.trained(n, "fp32")) for group in self.shapes for n in group}
        optimizer = self.model_state(0)["optimizer"] or {}
        if not self.optimizer_names or "fp32_groups" not in optimizer:
            return {}
        places = {n: (g, i) for g, group in enumerate(self.optimizer_names) for i, n in enumerate(group)}

        def master(name: str) -> torch.Tensor:
            g, i = places[name]
            shards = [self.model_state(t)["optimizer"]["fp32_groups"][g][i].detach() for t in range(self.tp)]
            return self.layout(name, shards[0].shape).gather(shards)

        return {name: (lambda name=name: master(name)) for name in places}


def base_state(partition: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of the optimizer inside ZeRO."""
    found = partition.get("base_optimizer_state", partition.get("optimizer_state_dict"))
    if not isinstance(found, dict):
        raise TPError("the checkpoint was written with zero_optimization.elastic_checkpoint, which is not supported")
    return found


def flat_tensor(partition: Mapping[str, Any], group: int, key: str) -> torch.Tensor:
    """A flat group of a partition: its fp32 weights (``key="fp32"``) or one of its optimizer states."""
    if key == "fp32":
        stage3 = partition.get("fp32_flat_groups")
        flat: torch.Tensor = (partition["single_partition_of_fp32_groups"] if stage3 is None else stage3)[group]
        return flat.detach()
    return base_state(partition)["state"][group][key]  # type: ignore[no-any-return]


def is_flat(value: object, length: int) -> bool:
    """Whether an optimizer state is per element (``exp_avg``), not a scalar (``step``)."""
    return isinstance(value, torch.Tensor) and value.numel() == length and value.dim() > 0


def layouts_from(written: Mapping[str, Any]) -> dict[str, ParamLayout]:
    """Layouts as they stand in the sidecar."""
    return {
        name: ParamLayout(
            tuple(entry["shape"]), entry["dim"], tuple(tuple((a, b) for a, b in part) for part in entry["parts"]),
            entry["pad_to"],
        )
        for name, entry in written.items()
    }  # fmt: skip


def layouts_to(layouts: Mapping[str, ParamLayout]) -> dict[str, Any]:
    """The inverse of :func:`layouts_from`, for JSON."""
    return {
        name: {"shape": layout.shape, "dim": layout.dim, "parts": layout.parts, "pad_to": layout.pad_to}
        for name, layout in layouts.items()
        if layout.is_sharded
    }


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob("*.pt")):
        if match := pattern.match(path.name):
            found[int(match[2]), int(match[1] or 0)] = path
    return found


@dataclass
class Target:
    """The rank, in a world of other tp and dp, for which a checkpoint is rewritten.

    Attributes:
        shapes: local shapes of its optimizer's flat groups; None to keep the checkpoint's grouping.
    """

    tp: int
    dp: int
    tp_rank: int
    dp_rank: int
    layouts: Mapping[str, ParamLayout]
    shapes: Shapes | None = None

    def shard(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        layout = self.layouts.get(name)
        return whole if layout is None or not layout.is_sharded else layout.shard(whole, self.tp_rank)

    def local_shape(self, name: str, whole: Iterable[int]) -> tuple[int, ...]:
        """The shape of this rank's part."""
        layout = self.layouts.get(name)
        return tuple(whole) if layout is None else layout.local_shape(self.tp_rank)


def shapes_for(source: Checkpoint, target: Target) -> Shapes:
    """The flat groups of ``target``."""
    if target.shapes is not None:
        return target.shapes
    return [
        {name: target.local_shape(name, source.layout(name, shape).shape) for name, shape in group.items()}
        for group in source.shapes
    ]


def model_file(source: Checkpoint, target: Target) -> dict[str, Any]:
    """The contents of a target rank's ``model_states`` file."""
    first = source.model_state(0)
    state = dict(first)
    state["dp_world_size"], state["mp_world_size"] = target.dp, target.tp
    if "checkpoint_parallel_dimensions" in state:
        state["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": target.tp}
    if source.stage != 3:
        module = OrderedDict((key, target.shard(key, source.weight(key))) for key in first["module"])
        state["module"] = module
    if not source.stage:
        state["optimizer"] = _whole_optimizer(source, target)
        return state
    state["param_shapes"] = [
        OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in shapes_for(source, target)
    ]
    if first.get("frozen_param_shapes"):
        shapes, fragments = OrderedDict(), OrderedDict()
        for name in first["frozen_param_shapes"]:
            local = target.shard(name, source.frozen(name))
            shapes[name] = torch.Size(local.shape)
            fragments[name] = _piece(local, target) if source.stage == 3 else local
        state["frozen_param_shapes"] = shapes
        if first.get("frozen_param_fragments") is not None:
            state["frozen_param_fragments"] = fragments
    return state


def optimizer_file(source: Checkpoint, target: Target) -> dict[str, Any]:
    """The contents of a target rank's ``optim_states`` file."""
    template = source.optimizer_state(0, 0)
    if any(any(pads) for pads in template.get("param_alignment_paddings") or []):
        raise TPError("the checkpoint pads single parameters (param_alignment_paddings), which is not supported")
    groups = partitions(shapes_for(source, target), source.stage, target.dp, target.dp_rank)
    home = {name: g for g, group in enumerate(source.shapes) for name in group}
    base = base_state(template)
    states, masters = {}, []
    for number, (length, slots) in enumerate(groups):
        group = home[slots[0].name] if slots else min(number, len(base["state"]) - 1)
        masters.append(_flat(source, target, slots, length, "fp32"))
        flat = set(source.state_keys(group)) if group in base["state"] else set()
        states[number] = {
            key: _flat(source, target, slots, length, key) if key in flat else value
            for key, value in base["state"].get(group, {}).items()
        }
    new_base = {**base, "state": states}
    partition = dict(template)
    if source.stage == 3:
        partition |= {"optimizer_state_dict": new_base, "fp32_flat_groups": masters, "partition_count": target.dp}
    else:
        totals = [sum(math.prod(shape) for shape in group.values()) for group in shapes_for(source, target)]
        last = target.dp_rank == target.dp - 1
        partition |= {
            "base_optimizer_state": new_base,
            "single_partition_of_fp32_groups": masters,
            "partition_count": [target.dp] * len(groups),
            "group_paddings": [
                n * target.dp - total if last else 0 for (n, _), total in zip(groups, totals, strict=True)
            ],
            "param_slice_mappings": [_mapping(slots) for _, slots in groups],
        }
        if template.get("param_alignment_paddings") is not None:
            partition["param_alignment_paddings"] = [[0] * len(group) for group in shapes_for(source, target)]
    outer = source._load(source._optimizer_files[0, 0])
    return {**outer, "optimizer_state_dict": partition}


def _flat(source: Checkpoint, target: Target, slots: list[Slot], length: int, key: str) -> torch.Tensor:
    flat: torch.Tensor | None = None
    for slot in slots:
        if slot.count:
            local = target.shard(slot.name, source.trained(slot.name, key)).reshape(-1)
            flat = local.new_zeros(length) if flat is None else flat
            flat[slot.at : slot.at + slot.count] = local[slot.begin : slot.begin + slot.count]
    return torch.zeros(length) if flat is None else flat


def _piece(local: torch.Tensor, target: Target) -> torch.Tensor:
    size = math.ceil(local.numel() / target.dp)
    flat = local.new_zeros(size * target.dp)
    flat[: local.numel()] = local.reshape(-1)
    return flat[target.dp_rank * size : (target.dp_rank + 1) * size].clone()


def _mapping(slots: list[Slot]) -> OrderedDict[str, Any]:
    from deepspeed.utils.tensor_fragment import fragment_address

    return OrderedDict((slot.name, fragment_address(start=slot.at, numel=slot.count)) for slot in slots)


def _whole_optimizer(source: Checkpoint, target: Target) -> Any:
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
        same = layout is None or all(tuple(s.shape) == layout.local_shape(t) for t, s in enumerate(shards))
        if not shards[0].dim() or not same:
            return shards[0]
        return target.shard(name, shards[0] if layout is None else layout.gather(shards))

    order = [number for group in inner[0]["param_groups"] for number in group["params"]]
    by_number = dict(zip(order, names, strict=True))
    state = {
        number: {key: convert(by_number[number], [one["state"][number][key] for one in inner]) for key in entry}
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


def file_names(source: Checkpoint, tp_rank: int, dp_rank: int) -> tuple[str, str | None]:
    """What DeepSpeed calls the two files of a rank; the second is None without ZeRO."""
    model = f"mp_rank_{tp_rank:02d}_model_states.pt"
    if not source.stage:
        return model, None
    bf16 = "bf16_" if next(iter(source._optimizer_files.values())).name.startswith("bf16_") else ""
    optimizer = f"{bf16}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
    return (f"zero_pp_rank_{dp_rank}_{model}" if source.stage == 3 else model), optimizer
