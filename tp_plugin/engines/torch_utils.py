"""torch's own helpers that look at all gradients: norms, clipping, and fp16's decision to skip a step."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad

from tp_plugin.engines.patching import patch, wrap


def install() -> None:
    """Make ``get_total_norm``, ``clip_grad_norm_`` and ``GradScaler`` see the whole model; once."""
    original = clip_grad._get_total_norm
    if getattr(original, "sees_whole_model", False):
        return

    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        layouts = _layouts()
        if layouts is None:
            return original(tensors, norm_type, error_if_nonfinite, foreach)
        with torch.no_grad():
            norm: torch.Tensor = layouts.total_norm(tensors, float(norm_type))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        return norm

    get_total_norm.__doc__ = original.__doc__
    get_total_norm.sees_whole_model = True  # type: ignore[attr-defined]
    # clip_grad_norm_ calls the private name; scripts import the public one
    patch(clip_grad, "_get_total_norm", get_total_norm)
    patch(torch.nn.utils, "get_total_norm", get_total_norm)
    wrap(torch.amp.GradScaler, "_unscale_grads_", _unscale_grads)


def _layouts() -> Any:
    """The module that knows the layouts, once a model is sharded. Patching torch must not import half of the plugin."""
    layouts = sys.modules.get("tp_plugin.parallel.layouts")
    return layouts if layouts is not None and layouts.any_sharded() else None


def _unscale_grads(original: Any, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
    """An inf in one rank's shard is an inf in the model: every rank of the TP group must skip the step."""
    found: dict[torch.device, torch.Tensor] = original(*args, **kwargs)
    if _layouts() is not None:
        from tp_plugin.parallel.mesh import require_mesh

        for tensor in found.values():
            require_mesh().tp_for(tensor).all_reduce(tensor, dist.ReduceOp.MAX)
    return found
