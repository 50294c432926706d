"""When gradients are summed over the ranks that share elements, and when they are made equal there.

Summed: around a backward, and around DDP's averages in it. Made equal: at the first of ``unscale_``, clipping and step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.utils import clip_grad

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.runtime.runtime import Runtime, current


def install() -> None:
    """Patch torch's entry to the autograd engine, DDP, and what is the first to use gradients."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        wrap(clip_grad, name, _clip)
        patch(torch.nn.utils, name, getattr(clip_grad, name))
    wrap(torch.amp.GradScaler, "unscale_", _unscale)
    wrap(torch.autograd, "_engine_run_backward", _run_backward)
    wrap(torch.nn.parallel.DistributedDataParallel, "_post_forward", _ddp_output)


def _run_backward(original: Any, outputs: Any, *args: Any, accumulate_grad: bool = False, **kwargs: Any) -> Any:
    run = functools.partial(original, outputs, *args, accumulate_grad=accumulate_grad, **kwargs)
    runtime = current()
    if runtime is None:
        return run()
    runtime.progress.backwards += accumulate_grad
    is_recorded = bool(args[2]) if len(args) > 2 else bool(kwargs.get("create_graph"))
    with runtime.region.step(), runtime.replica_sums.backward(accumulate_grad and not is_recorded):
        return run()


def read_at_once(parameters: Any) -> list[Any]:
    """From now on an engine reads gradients while the backward runs; returns those that are summed over ranks."""
    from tp_plugin.tensor.param_entry import entry_of

    entries = ((parameter, entry_of(parameter)) for parameter in parameters)
    members = [(entry.replica_sum, p) for p, entry in entries if entry is not None and entry.replica_sum is not None]
    for replica_sum, _ in members:
        replica_sum.at_once = True
    return members


def _ddp_output(original: Any, self: Any, output: Any) -> Any:
    """A gradient of the output begins a backward in which DDP averages, if it does, and in which sums can wait."""
    from torch.nn.parallel.distributed import _find_tensors

    output = original(self, output)
    members = self.__dict__.get("tp_members")
    runtime = current()
    if members and runtime is not None and torch.is_grad_enabled():

        def begin(grad: torch.Tensor) -> None:
            runtime.replica_sums.average_first(members)

        with torch._C.DisableTorchFunctionSubclass():
            for tensor in _find_tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(begin)
    return output


def _clip(original: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = current()
    if runtime is None:
        return original(parameters, *args, **kwargs)
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    with runtime.region.step():
        make_equal(parameters, runtime)
        return original(parameters, *args, **kwargs)


def _unscale(original: Any, self: Any, optimizer: Any) -> Any:
    runtime = current()
    if runtime is None:
        return original(self, optimizer)
    with runtime.region.step():
        make_equal(stepped(optimizer), runtime)
        return original(self, optimizer)


def stepped(optimizer: Any) -> list[Any]:
    """The parameters that ``optimizer`` trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def make_equal(parameters: list[Any], runtime: Runtime) -> None:
    """Gradients of what several ranks hold are equal there; once after each backward."""
    if runtime.models:
        from tp_plugin.shard.gradients import agree_once

        agree_once(parameters, runtime)
