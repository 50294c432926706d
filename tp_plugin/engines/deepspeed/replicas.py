"""Gradients of replicated parameters are equal on the ranks of a TP group when DeepSpeed steps, wherever it keeps them.

Not under ZeRO 1 and 2 where shards are uneven: there each TP rank's partition of the flat gradients holds other pieces;
nor where ZeRO has moved gradients to the host. The audit watches over those.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.engines.patching import wrap
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.runtime import current
from tp_plugin.shard.gradients import agree, agree_once
from tp_plugin.tensor.param_entry import layout_of


def install(engine: Any) -> None:
    """Patch ``deepspeed.runtime.engine``: the step at the end of an accumulation."""
    wrap(engine.DeepSpeedEngine, "_take_model_step", _take_model_step)


def _take_model_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = current()
    if runtime is not None:
        kept = _kept(self.optimizer, runtime.mesh)
        if kept is None:
            agree_once(self.module.parameters(), runtime)
        else:
            agree(kept, runtime.mesh)
    result = original(self, *args, **kwargs)
    if runtime is not None:
        runtime.progress.end_first_step()
    return result


def _kept(optimizer: Any, mesh: Mesh) -> list[tuple[ParamLayout | None, torch.Tensor]] | None:
    """Gradients that the optimizer keeps apart from the parameters; None: it keeps none."""
    if hasattr(optimizer, "bf16_groups"):
        pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        both = (pair for group, grads in pairs for pair in zip(group, grads, strict=True))
        return [(layout_of(parameter), grad.view(parameter.shape)) for parameter, grad in both]
    averaged = getattr(optimizer, "averaged_gradients", None)
    if averaged is None:
        return None
    partitioned = hasattr(optimizer, "params_in_partition")  # flat over all parameters: ZeRO 1 and 2
    groups = optimizer.params_in_partition if partitioned else optimizer.fp16_groups
    if partitioned and any(_is_uneven(layout_of(p), mesh) for group in optimizer.bit16_groups for p in group):
        return []
    kept = []
    for number, group in enumerate(groups):
        grads = [grad for grad in averaged.get(number) or () if not getattr(grad, "_zero_padding", False)]
        pairs = [(layout_of(parameter), grad) for parameter, grad in zip(group, grads, strict=False)]
        kept += [pair for pair in pairs if _is_equal(pair[0], mesh)]
    return kept


def _is_uneven(layout: ParamLayout | None, mesh: Mesh) -> bool:
    return layout is not None and len({layout.local_numel(rank) for rank in _tp_group(mesh)}) > 1


def _is_equal(layout: ParamLayout | None, mesh: Mesh) -> bool:
    """Whether the ranks of this TP group, and no others, have all of it: stages cut their gradients differently."""
    return layout is None or layout.whole_on == _tp_group(mesh)


def _tp_group(mesh: Mesh) -> tuple[int, ...]:
    first = mesh.pp.rank * mesh.tp_size
    return tuple(range(first, first + mesh.tp_size))
