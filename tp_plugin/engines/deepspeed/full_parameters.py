"""What ``tp_plugin.full_parameters`` needs of DeepSpeed: ZeRO-3's partitions gathered, and fp32 copies that follow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tp_plugin.tensor.global_view import ScriptRegion


def is_held(parameter: Any) -> bool:
    """Whether DeepSpeed keeps ``parameter`` elsewhere: partitioned, or in an fp32 copy that its optimizer steps."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


@contextlib.contextmanager
def gathered(parameters: Sequence[Any], write: bool, region: ScriptRegion) -> Iterator[None]:
    """Inside, each parameter is all that this TP rank has of it, and what is written into it lasts.

    Collective over the data group. An element that was written to is written to in the fp32 copy, too; of the others
    the copy stays as it is.
    """
    held = [parameter for parameter in parameters if is_held(parameter)]
    if not held:
        yield
        return
    with region.step():
        before = [_lasting(parameter).clone() for parameter in held] if write else []
        with _partitions_gathered([p for p in held if hasattr(p, "ds_id")], write), region.script():
            yield
        for parameter, old in zip(held, before, strict=write):
            if parameter.requires_grad:
                _write_copy(parameter, old)


@contextlib.contextmanager
def _partitions_gathered(partitioned: list[Any], write: bool) -> Iterator[None]:
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def _lasting(parameter: Any) -> torch.Tensor:
    """What remains outside of the gathering: a partition, or the parameter."""
    found: torch.Tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
    return found.detach()


def _write_copy(parameter: Any, old: torch.Tensor) -> None:
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    partitioned = hasattr(parameter, "ds_id")
    if partitioned and not hasattr(parameter, "_z3_optimizer"):
        return  # before deepspeed.initialize: there is no copy yet
    read, put = (
        (safe_get_local_fp32_param, safe_set_local_fp32_param)
        if partitioned
        else (safe_get_full_fp32_param, safe_set_full_fp32_param)
    )
    copy, new = read(parameter), _lasting(parameter)
    if copy is not None:
        new, old = new.reshape(-1)[: copy.numel()], old.reshape(-1)[: copy.numel()]
        put(parameter, torch.where(new != old, new.to(copy), copy.reshape(-1)).view(copy.shape))
