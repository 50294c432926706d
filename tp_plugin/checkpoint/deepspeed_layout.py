"""How DeepSpeed lays parameters out in its checkpoint files, and the sidecar in which we say how TP splits them.

A checkpoint is a folder (the *tag*) with, for TP rank t and DP rank d (deepspeed/runtime/engine.py, zero/*.py, 0.19):

    mp_rank_<t>_model_states.pt                       weights, counters, scheduler; without ZeRO the optimizer
    [bf16_]zero_pp_rank_<d>_mp_rank_<t>_optim_states.pt   ZeRO: a partition of flat fp32 weights and optimizer states
    zero_pp_rank_<d>_mp_rank_<t>_model_states.pt      ZeRO-3 instead of the first: placeholders and frozen partitions
    tp_plugin.json                                    ours, the sidecar

Under ZeRO an optimizer's parameter group is one *flat group*: its parameters, flattened, one after the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout

SIDECAR = "tp_plugin.json"
"""``tp_size``, ``dp_size``, ``layouts``, ``optimizer_names``, ``aliases``, ``config`` and ``model_class``, and as
``tp_plugin`` the run's mapping of that name (options, the reference of a policy)."""

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

GroupShapes = list[dict[str, tuple[int, ...]]]
"""For each flat group of an optimizer, the local shapes of its parameters by name, in order."""


@dataclass(frozen=True)
class FlatSlice:
    """Where a rank's flat group holds ``length`` elements of parameter ``name``.

    They are elements ``[start, start + length)`` of the flattened local tensor, and lie at ``offset`` in the group.
    """

    name: str
    start: int
    length: int
    offset: int


def flat_groups(shapes: GroupShapes, stage: int, dp: int, dp_rank: int) -> list[tuple[int, list[FlatSlice]]]:
    """Length and contents of the partition that a DP rank holds of each flat group, under ZeRO ``stage`` 1, 2 or 3.

    Stages 1 and 2 pad a group to a multiple of 2·dp and cut it into dp partitions (stage_1_and_2.py,
    ``flatten_dense_tensors_aligned``, whose alignment is nccl_start_alignment_factor = 2). Stage 3 cuts each parameter
    into dp pieces of ceil(numel / dp) and concatenates a rank's pieces (partition_parameters.py).
    """
    groups = []
    for group in shapes:
        slices = []
        numels = {name: math.prod(shape) for name, shape in group.items()}
        if stage == 3:
            length = 0
            for name, numel in numels.items():
                piece = math.ceil(numel / dp)
                start = min(dp_rank * piece, numel)
                slices.append(FlatSlice(name, start, min(piece, numel - start), length))
                length += piece
        else:
            length = math.ceil(sum(numels.values()) / (2 * dp)) * 2
            low, high, position = dp_rank * length, (dp_rank + 1) * length, 0
            for name, numel in numels.items():
                start, stop = max(position, low), min(position + numel, high)
                if start < stop:
                    slices.append(FlatSlice(name, start - position, stop - start, start - low))
                position += numel
        groups.append((length, slices))
    return groups


def base_optimizer_state(partition: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of the optimizer that ZeRO wraps, in a rank's ``optim_states`` file.

    Raises:
        TPError: it was saved for an elastic world, in another form.
    """
    found = partition.get("base_optimizer_state", partition.get("optimizer_state_dict"))
    if not isinstance(found, dict):
        raise TPError("the checkpoint was written with zero_optimization.elastic_checkpoint, which is not supported")
    return found


def flat_tensor(partition: Mapping[str, Any], group: int, key: str) -> torch.Tensor:
    """A rank's partition of a flat group (1-D): its fp32 weights (``key="fp32"``) or one of its optimizer states."""
    if key == "fp32":
        stage3 = partition.get("fp32_flat_groups")
        flat: torch.Tensor = (partition["single_partition_of_fp32_groups"] if stage3 is None else stage3)[group]
        return flat.detach()
    return base_optimizer_state(partition)["state"][group][key]  # type: ignore[no-any-return]


def model_file_name(stage: int, tp_rank: int, dp_rank: int) -> str:
    """What DeepSpeed calls the model file of a rank; below stage 3 all DP ranks share it."""
    name = f"mp_rank_{tp_rank:02d}_model_states.pt"
    return f"zero_pp_rank_{dp_rank}_{name}" if stage == 3 else name


def optimizer_file_name(bf16: bool, tp_rank: int, dp_rank: int) -> str:
    """What DeepSpeed calls the optimizer file of a rank under ZeRO."""
    return f"{'bf16_' * bf16}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"


def model_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The model files in a tag's folder, by TP rank and DP rank (0 below stage 3)."""
    return _by_rank(folder, _MODEL)


def optimizer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """ZeRO's optimizer files in a tag's folder, by TP rank and DP rank."""
    return _by_rank(folder, _OPTIMIZER)


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob("*.pt")):
        if match := pattern.match(path.name):
            found[int(match[2]), int(match[1] or 0)] = path
    return found


def read_sidecar(folder: Path) -> dict[str, Any]:
    """The sidecar of a tag's folder, with ``layouts`` as :class:`ParamLayout`; empty for a plain DeepSpeed checkpoint.

    Raises:
        TPError: it is damaged.
    """
    path = folder / SIDECAR
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(sidecar[key], int) for key in ("tp_size", "dp_size")):
            raise ValueError("tp_size and dp_size must be whole numbers")
        return {**sidecar, "layouts": {name: _layout(entry) for name, entry in sidecar["layouts"].items()}}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise TPError(f"{path} is damaged: {error!r}") from error


def write_sidecar(folder: Path, sidecar: Mapping[str, Any]) -> None:
    """Write what :func:`read_sidecar` gives; of the layouts those that are sharded."""
    layouts = {
        name: {
            "shape": layout.shape,
            "dim": layout.dim,
            "parts": layout.parts,
            "pad_to": layout.pad_to,
            **({"absent": layout.absent} if layout.absent else {}),
        }
        for name, layout in sharded(sidecar["layouts"]).items()
    }
    text = json.dumps({"format": 1, **sidecar, "layouts": layouts})
    (folder / SIDECAR).write_text(text, encoding="utf-8")


def sharded(layouts: Mapping[str, ParamLayout]) -> dict[str, ParamLayout]:
    """The layouts of parameters that are split over the TP ranks."""
    return {name: layout for name, layout in layouts.items() if layout.is_sharded}


def _layout(entry: Mapping[str, Any]) -> ParamLayout:
    parts = tuple(tuple((start, stop) for start, stop in part) for part in entry["parts"])
    absent = tuple(entry.get("absent") or ())
    return ParamLayout(tuple(entry["shape"]), entry["dim"], parts, entry["pad_to"], absent)
