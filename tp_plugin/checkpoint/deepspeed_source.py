"""A DeepSpeed checkpoint of any tp and dp, read as full tensors; the files' format: deepspeed_layout.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tp_plugin.checkpoint import safe_pickle
from tp_plugin.checkpoint.deepspeed_layout import (
    SIDECAR,
    GroupShapes,
    base_optimizer_state,
    flat_groups,
    flat_tensor,
    model_file_name,
    model_files,
    optimizer_file_name,
    optimizer_files,
    read_sidecar,
)
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout


class DeepSpeedCheckpoint:
    """One saved checkpoint. Files are opened when they are needed; tensors are mapped from them, on the CPU.

    Args:
        folder: the tag's folder.
        optimizer_names: names of the optimizer's parameters per group, for a checkpoint without ZeRO and without our
            sidecar (its optimizer state is by number).
        trust: read pickles that name unknown classes (:mod:`tp_plugin.checkpoint.safe_pickle`).

    Attributes:
        tp, dp, stage: the sizes and the ZeRO stage that it was saved with (0: without ZeRO).
        sidecar: what we wrote beside DeepSpeed's files; empty for plain DeepSpeed's.
        layouts: how the parameters that are split lie on the TP ranks, by name.

    Raises:
        TPError: a file is missing, truncated, of another kind or not to be trusted; the message names it.
    """

    def __init__(self, folder: Path, optimizer_names: list[list[str]] | None = None, *, trust: bool = False):
        self.folder, self.trust = folder, trust
        self._open: dict[str, Any] = {}
        self._last_trained: tuple[tuple[str, str], torch.Tensor] | None = None
        self._model_files, self._optimizer_files = model_files(folder), optimizer_files(folder)
        if (0, 0) not in self._model_files:
            raise TPError(f"{folder} holds no DeepSpeed checkpoint: no *mp_rank_00_model_states.pt in it")
        self.sidecar = read_sidecar(folder)
        self.layouts: dict[str, ParamLayout] = self.sidecar.get("layouts", {})
        first = self.model_state(0)
        missing = [key for key in ("module", "mp_world_size", "dp_world_size", "ds_config") if key not in first]
        if missing:
            raise TPError(f"{self.first_model_file} is no DeepSpeed checkpoint: it has no key {missing[0]!r}")
        self.tp, self.dp = int(first["mp_world_size"]), int(first["dp_world_size"])
        if self.tp > 1 and not self.sidecar:
            raise TPError(
                f"{folder} was saved with a model-parallel size of {self.tp} and has no {SIDECAR}; how its tensors "
                "were split is not known"
            )
        self.optimizer_names = self.sidecar.get("optimizer_names") or optimizer_names
        self.bf16 = any(path.name.startswith("bf16_") for path in self._optimizer_files.values())
        self.stage = self._find_stage()
        self._check_complete()

    def _find_stage(self) -> int:
        if not self._optimizer_files:
            return 0
        partition = self.partition(0, 0)
        return 3 if "fp32_flat_groups" in partition else int(partition["zero_stage"])

    def _check_complete(self) -> None:
        for t in range(self.tp):
            for d in range(self.dp):
                needed = {model_file_name(self.stage, t, d): (t, d if self.stage == 3 else 0) in self._model_files}
                if self.stage:
                    needed[optimizer_file_name(self.bf16, t, d)] = (t, d) in self._optimizer_files
                for name, is_there in needed.items():
                    if not is_there:
                        raise TPError(f"checkpoint {self.folder} is not complete: {name} is missing")

    @property
    def first_model_file(self) -> Path:
        """The model file of the first rank."""
        return self._model_files[0, 0]

    def model_state(self, tp_rank: int, dp_rank: int = 0) -> dict[str, Any]:
        """The contents of a rank's model file (shared by all DP ranks below stage 3)."""
        path = self._model_files.get((tp_rank, dp_rank)) or self._model_files.get((tp_rank, 0))
        if path is None:
            raise TPError(f"checkpoint {self.folder} is not complete: no model states of TP rank {tp_rank}")
        return self._read(path)

    def optimizer_file(self, tp_rank: int, dp_rank: int) -> dict[str, Any]:
        """The contents of a rank's optimizer file under ZeRO."""
        if (tp_rank, dp_rank) not in self._optimizer_files:
            name = optimizer_file_name(self.bf16, tp_rank, dp_rank)
            raise TPError(f"checkpoint {self.folder} is not complete: {name} is missing")
        return self._read(self._optimizer_files[tp_rank, dp_rank])

    def partition(self, tp_rank: int, dp_rank: int) -> dict[str, Any]:
        """A rank's partition of the optimizer under ZeRO."""
        return self.optimizer_file(tp_rank, dp_rank)["optimizer_state_dict"]  # type: ignore[no-any-return]

    def _read(self, path: Path) -> dict[str, Any]:
        if path.name not in self._open:
            found = safe_pickle.load(path, trust=self.trust)
            if not isinstance(found, dict):
                raise TPError(f"{path} is no DeepSpeed checkpoint: it holds a {type(found).__name__}")
            self._open[path.name] = found
        return self._open[path.name]  # type: ignore[no-any-return]

    @property
    def group_shapes(self) -> GroupShapes:
        """The flat groups under ZeRO, with the shapes of TP rank 0; of later pipeline stages those of their first rank.

        DeepSpeed leaves out parameters without elements. Put together again, a group is in the order of the model.
        """
        first, *others = [self._group_shapes(t) for t in range(self.tp)]
        if all([list(group) for group in other] == [list(group) for group in first] for other in others):
            return first
        order = {name: at for at, name in enumerate(self.model_state(0)["module"])}
        merged = []
        for groups in zip(first, *others, strict=True):
            shapes = {name: shape for group in reversed(groups) for name, shape in group.items()}
            merged.append({name: shapes[name] for name in sorted(shapes, key=order.__getitem__)})
            if any(list(group) != [name for name in merged[-1] if name in group] for group in groups):
                raise TPError(
                    f"checkpoint {self.folder} was saved with pipeline stages and an optimizer whose parameters are not"
                    " in the order of the model, which is not known from it; resume with the sizes it was saved with"
                )
        return merged

    def _group_shapes(self, tp_rank: int) -> GroupShapes:
        groups = self.model_state(tp_rank)["param_shapes"]
        return [{name: tuple(shape) for name, shape in group.items()} for group in groups]

    def layout(self, name: str, shape: Iterable[int]) -> ParamLayout:
        """The layout a parameter was saved in; ``shape`` is used for one that was not split."""
        return self.layouts.get(name) or ParamLayout.replicated(tuple(shape), self.tp)

    def gather(self, name: str, shards: list[torch.Tensor]) -> torch.Tensor:
        """The full tensor of a parameter, or of something that is split like it, from the TP ranks' local ones."""
        return self.layout(name, shards[0].shape).gather(shards)

    def full_weight(self, key: str) -> torch.Tensor:
        """A full tensor of the model's ``state_dict`` below stage 3, in the dtype of training."""
        return self.gather(key, [self.model_state(t)["module"][key] for t in range(self.tp)])

    def full_frozen(self, name: str) -> torch.Tensor:
        """A full parameter that the optimizer does not own, in the dtype of training."""
        if self.stage != 3:
            return self.full_weight(name)
        shards = []
        for t in range(self.tp):
            shape = tuple(self.model_state(t)["frozen_param_shapes"][name])
            pieces = [self.model_state(t, d)["frozen_param_fragments"][name].reshape(-1) for d in range(self.dp)]
            shards.append(torch.cat(pieces)[: math.prod(shape)].reshape(shape))
        return self.gather(name, shards)

    def full_trained(self, name: str, key: str) -> torch.Tensor:
        """A full fp32 weight (``key="fp32"``) or optimizer state (``key="exp_avg"`` …) under ZeRO 1, 2 or 3.

        Raises:
            TPError: the optimizer does not own ``name``.
        """
        if self._last_trained is None or self._last_trained[0] != (name, key):
            found = [self._local_trained(name, key, t) for t in range(self.tp)]
            like = next((one for one in found if one is not None), None)
            if like is None:
                raise TPError(f"checkpoint {self.folder} has no optimizer state of parameter {name!r}")
            shapes = [self.layout(name, like.shape).local_shape(t) for t in range(self.tp)]
            shards = [like.new_empty(shapes[t]) if one is None else one for t, one in enumerate(found)]
            self._last_trained = (name, key), self.gather(name, shards)
        return self._last_trained[1]

    def _local_trained(self, name: str, key: str, tp_rank: int) -> torch.Tensor | None:
        """None: of a parameter that this rank has nothing of."""
        groups = self._group_shapes(tp_rank)
        number = next((g for g, group in enumerate(groups) if name in group), None)
        if number is None:
            return None
        pieces = []
        for d in range(self.dp):
            flat = flat_tensor(self.partition(tp_rank, d), number, key)
            ((_, slices),) = flat_groups([groups[number]], self.stage, self.dp, d)
            pieces += [flat[piece.offset : piece.offset + piece.length] for piece in slices if piece.name == name]
        return torch.cat(pieces).reshape(groups[number][name])

    def state_keys(self, group: int) -> list[str]:
        """Names of the optimizer states of a flat group that have one number per element, under ZeRO.

        ``exp_avg`` is one, ``step`` is not. Empty for a group without states.
        """
        partition = self.partition(0, 0)
        states = base_optimizer_state(partition)["state"].get(group)
        if not states:
            return []
        length = flat_tensor(partition, group, "fp32").numel()
        return [
            key
            for key, value in states.items()
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() == length
        ]

    @property
    def aliases(self) -> dict[str, str]:
        """Names that are another parameter's second name (tied weights), with the first one."""
        known = self.sidecar.get("aliases")  # DeepSpeed takes parameters without elements for one that is tied
        return dict(self.model_state(0).get("shared_params") or {}) if known is None else known

    def full_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The full model, as ``zero_to_fp32`` gives it: fp32 masters of what is trained, frozen ones, buffers, ties."""
        state = self.model_state(0)
        readers = self._master_readers()
        for key in state["module"]:
            if key in readers:
                yield key, readers[key]()
            elif self.stage == 3 and key in (state["frozen_param_shapes"] or {}):
                yield key, self.full_frozen(key).float()
            elif self.stage == 3 and key not in state["buffer_names"]:
                owner = self.aliases.get(key)
                if owner not in readers:
                    raise TPError(f"checkpoint {self.folder} has no data of {key!r}")
                yield key, readers[owner]()
            else:
                yield key, self.full_weight(key)

    def _master_readers(self) -> dict[str, Callable[[], torch.Tensor]]:
        """For each parameter that has an fp32 master: what reads it."""
        if self.stage:
            names = [name for group in self.group_shapes for name in group]
            return {name: lambda name=name: self.full_trained(name, "fp32") for name in names}  # type: ignore[misc]
        optimizer = self.model_state(0)["optimizer"] or {}
        if not self.optimizer_names or "fp32_groups" not in optimizer:
            return {}
        return {
            name: lambda name=name, g=g, i=i: self._full_unpartitioned_master(name, g, i)  # type: ignore[misc]
            for g, group in enumerate(self.optimizer_names)
            for i, name in enumerate(group)
        }

    def _full_unpartitioned_master(self, name: str, group: int, number: int) -> torch.Tensor:
        states = [self.model_state(t)["optimizer"]["fp32_groups"] for t in range(self.tp)]
        return self.gather(name, [groups[group][number].detach() for groups in states])
