"""Gradient norms of the whole model in DeepSpeed's optimizers.

DeepSpeed counts a parameter with ``tensor_model_parallel`` on every rank and others on rank 0 of the model-parallel
group. What it cannot know is a shard of which a part is held by other ranks too (KV heads replicated, because there are
fewer than ranks): here those elements are blanked, on all ranks but their first holder, before it takes the norm. Known
are their ranges, made once and kept where the gradients are.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.runtime.runtime import current, current_mesh, require
from tp_plugin.shard.params import layouts_of
from tp_plugin.tensor.grad_norm import not_owned, sharded_grad_norm, total_norm
from tp_plugin.tensor.param_entry import layout_of


def install_engine(engine: Any) -> None:
    """Patch ``deepspeed.runtime.engine``: clipping in fp32 without ZeRO."""
    original = vars(engine)["clip_grad_norm_"]

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None) -> Any:
        mesh = current_mesh()
        if mesh is None:
            return original(parameters, max_norm, norm_type, mpu)
        trained = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in trained]
        norm = total_norm(grads, [layout_of(p) for p in trained], mesh, norm_type)
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    patch(engine, "clip_grad_norm_", clip_grad_norm_)


def install_zero12(stage_1_and_2: Any) -> None:
    """Patch ZeRO stages 1 and 2."""
    cls = stage_1_and_2.DeepSpeedZeroOptimizer
    wrap(cls, "get_grad_norm_direct", _direct_12)
    wrap(cls, "complete_grad_norm_calculation_for_cpu_offload", _offloaded_12)


def install_zero3(stage3: Any) -> None:
    """Patch ZeRO stage 3."""
    cls = stage3.DeepSpeedZeroOptimizer_Stage3
    wrap(cls, "get_grad_norm_direct", _direct_3)
    wrap(cls, "complete_grad_norm_calculation_for_cpu_offload", _offloaded_3)


def install_bf16(bf16_optimizer: Any) -> None:
    """Patch the optimizer of bf16 with fp32 accumulation."""
    wrap(bf16_optimizer.BF16_Optimizer, "get_grads_for_norm", _grads_for_norm)


def install_fp16(fused_optimizer: Any) -> None:
    """Patch the optimizer of fp16 and bf16 without ZeRO."""
    wrap(fused_optimizer.FP16_Optimizer, "_get_norm_mask_idx", _norm_mask)


def install_unfused(unfused_optimizer: Any) -> None:
    """Patch the same for optimizers that cannot be fused; DeepSpeed's version drops all ranks but the first."""
    original = vars(unfused_optimizer)["get_weight_norm"]

    def get_weight_norm(parameters: Any, norm_type: float = 2, mpu: Any = None) -> float:
        runtime = current()
        if runtime is None:
            return float(original(parameters, norm_type, mpu))
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        layouts = layouts_of(tensors, [model.index for model in runtime.models])
        norm = sharded_grad_norm(tensors, layouts, runtime.mesh, norm_type).item()
        return norm if math.isfinite(norm) else -1.0

    patch(unfused_optimizer, "get_weight_norm", get_weight_norm)


def counted(parameter: torch.Tensor, fragment: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """``fragment``, which begins at element ``offset`` of a flat local gradient, without what other ranks count."""
    edges = _edges(parameter, offset, fragment.numel(), fragment.device)
    if edges is None:
        return fragment
    steps = torch.zeros(fragment.numel() + 1, dtype=torch.int8, device=fragment.device)
    steps[edges[0]], steps[edges[1]] = 1, -1
    return fragment.reshape(-1).masked_fill(steps.cumsum(0, dtype=torch.int8)[:-1].ne(0), 0)


def _edges(parameter: Any, offset: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Starts and stops of the ranges of a fragment that other ranks count, (2, n), made once; None: there are none."""
    made: dict[Any, torch.Tensor | None] = parameter.__dict__.setdefault("tp_skipped", {})
    key = offset, length, device
    if key not in made:
        inside = [(max(a - offset, 0), min(b - offset, length)) for a, b in _skipped(parameter)]
        inside = [(a, b) for a, b in inside if a < b]
        made[key] = torch.tensor(inside, device="cpu").T.contiguous().to(device) if inside else None
    return made[key]


def _skipped(parameter: Any) -> list[tuple[int, int]]:
    """Ranges of a flat shard that other ranks count."""
    layout, mesh = layout_of(parameter), current_mesh()
    return [] if layout is None or mesh is None or not layout.is_sharded else not_owned(layout, mesh.unit.rank)


def _direct_12(original: Any, self: Any, gradients: Any, params: Any, norm_type: float = 2) -> Any:
    group = next((i for i, mine in enumerate(self.params_in_partition) if mine is params), None)
    if group is None:
        return original(self, gradients, params, norm_type)
    fragments = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    offsets = [self.first_offset[group], *[0] * len(params)]
    masked = [counted(p, g, offset) for p, g, offset in zip(params, fragments, offsets, strict=False)]
    return original(self, masked, params, norm_type)


def _offloaded_12(original: Any, self: Any, params: Any) -> Any:
    for parameter in params:
        number = self.get_param_id(parameter)
        if number in self.norm_for_param_grads and _skipped(parameter):
            group, offset, at, count = self.grad_position[number]
            fragment = self.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, at, count)
            self.norm_for_param_grads[number] = torch.linalg.vector_norm(counted(parameter, fragment, offset))
    return original(self, params)


def _direct_3(original: Any, self: Any, gradients: Any, params: Any, norm_type: float = 2) -> Any:
    rank = require().mesh.data.rank if current_mesh() is not None else 0
    masked = [counted(p, g, rank * p.partition_numel()) for g, p in zip(gradients, params, strict=True)]
    return original(self, masked, params, norm_type)


def _offloaded_3(original: Any, self: Any, params: Any) -> Any:
    for parameter in params:
        number = self.get_param_id(parameter)
        if number in self.norm_for_param_grads and _skipped(parameter):
            group, at, count = self.grad_position[number]
            fragment = self.fp32_partitioned_groups_flat[group].grad.view(-1).narrow(0, at, count)
            offset = require().mesh.data.rank * parameter.partition_numel()
            self.norm_for_param_grads[number] = torch.linalg.vector_norm(counted(parameter, fragment, offset))
    return original(self, params)


def _grads_for_norm(original: Any, self: Any, for_clipping: bool = False) -> Any:
    found = original(self, for_clipping)
    if for_clipping or current_mesh() is None:
        return found
    gradients, experts = found
    holders = {
        id(gradient): parameter
        for parameters, mine in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True)
        for parameter, gradient in zip(parameters, mine, strict=True)
    }
    return [counted(holders[id(g)], g) for g in gradients], experts


def _norm_mask(original: Any, self: Any, group: Any) -> torch.Tensor:
    """Ranges (start, stop) of the group's flat gradient that this rank does not count, shape (n, 2), merged."""
    mesh = current_mesh()
    if mesh is None:
        return original(self, group)  # type: ignore[no-any-return]
    skipped, at = [(0, 0)], 0
    for parameter in group:
        layout, size = layout_of(parameter), parameter.numel()
        is_replicated = layout is None or not layout.is_sharded
        mine = _skipped(parameter) if not is_replicated else [] if mesh.is_leader else [(0, size)]
        for start, stop in ((at + a, at + b) for a, b in mine):
            begin = skipped.pop()[0] if skipped[-1][1] == start else start
            skipped.append((begin, stop))
        at += size
    ranges = [pair for pair in skipped if pair[0] < pair[1]]
    return torch.tensor(ranges, dtype=torch.int64, device="cpu").reshape(-1, 2).to(group[0].device)
