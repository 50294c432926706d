"""torch's own that looks at all gradients, or counts processes: backward, norms, clipping, skipped steps, samplers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data.distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tp_plugin.config.resolve import current_config
from tp_plugin.engines import functional_call, gradients, module_hooks, tensor_data
from tp_plugin.engines.patching import patch, remember, wrap
from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import held, is_split
from tp_plugin.mesh.roles import process_of
from tp_plugin.runtime.runtime import current


def install() -> None:
    """Make norms, clipping and ``GradScaler`` see the whole model, and samplers see replicas; once."""
    original = clip_grad._get_total_norm
    if getattr(original, "sees_whole_model", False):
        return

    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        runtime = current()
        if runtime is None or not runtime.models:
            return original(tensors, norm_type, error_if_nonfinite, foreach)
        from tp_plugin.shard.params import layouts_of
        from tp_plugin.tensor.grad_norm import total_norm

        with torch.no_grad():
            layouts = layouts_of(tensors, [model.index for model in runtime.models])
            norm: torch.Tensor = total_norm(tensors, layouts, runtime.mesh, float(norm_type))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        return _like(norm, tensors)

    get_total_norm.__doc__ = original.__doc__
    get_total_norm.sees_whole_model = True  # type: ignore[attr-defined]
    # clip_grad_norm_ calls the private name; scripts import the public one
    patch(clip_grad, "_get_total_norm", get_total_norm)
    patch(torch.nn.utils, "get_total_norm", get_total_norm)
    wrap(torch.amp.GradScaler, "_unscale_grads_", _unscale_grads)
    patch(torch.utils.data.distributed, "dist", _Replicas())
    wrap(torch.Tensor, "backward", _backward)
    wrap(torch.optim.Optimizer, "zero_grad", in_step)
    wrap(torch.nn.Module, "zero_grad", in_step)
    gradients.install()
    functional_call.install()
    wrap(torch.autograd, "_engine_run_backward", _run_backward)
    module_hooks.install()
    tensor_data.install()
    wrap(torch.amp.GradScaler, "step", in_step)
    remember(register_optimizer_step_pre_hook(_steps))
    remember(register_optimizer_step_post_hook(_stepped))
    remember(register_module_parameter_registration_hook(_registered))
    wrap(torch.nn.parallel.DistributedDataParallel, "__init__", _data_parallel)
    wrap(torch.nn.parallel.DistributedDataParallel, "register_comm_hook", _register_comm_hook)


def in_step(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``original`` is no code of the script's: inside, parameters are ordinary tensors of shards."""
    runtime = current()
    if runtime is None:
        return original(*args, **kwargs)
    with runtime.region.step():
        return original(*args, **kwargs)


def _data_parallel(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """A sharded model that a script wraps itself is averaged over the replicas, not over all ranks."""
    call = inspect.signature(original).bind(self, *args, **kwargs)
    runtime = current()
    if runtime is not None and call.arguments.get("process_group") is None:
        from tp_plugin.shard import is_sharded, models_in

        if any(is_sharded(root) for _, root in models_in(call.arguments["module"])):
            call.arguments["process_group"] = runtime.mesh.grad.pg
    in_step(original, *call.args, **call.kwargs)
    if runtime is not None:
        self.tp_members = gradients.read_at_once(self.module.parameters())


def _register_comm_hook(original: Any, self: Any, state: Any, hook: Any) -> Any:
    """Hooks that are given no group average over the world, and would mix shards of different weights.

    Raises:
        TPError: the hook is not one of torch's that average each element.
    """
    if self.process_group in (None, dist.group.WORLD) or _unit_size() == 1:
        return original(self, state, hook)
    elementwise = getattr(hook, "__module__", "") == default_hooks.__name__
    if not elementwise or not (state is None or isinstance(state, dist.ProcessGroup)):
        name = getattr(hook, "__qualname__", repr(hook))
        raise TPError(
            f"the DDP communication hook {name} is incompatible with tp_size: it may communicate over all ranks, which "
            "hold different shards, or look at whole gradients (PowerSGD); known are allreduce, fp16 and bf16 "
            "(torch.distributed.algorithms.ddp_comm_hooks.default_hooks)"
        )
    return original(self, self.process_group if state is None else state, hook)


def _backward(original: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    runtime = current()
    if runtime is not None:
        runtime.last_micro_batch.backward_from(self)
    return original(self, *args, **kwargs)


def _run_backward(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Every backward. What runs in autograd's threads meanwhile is called by this line of the script."""
    runtime = current()
    if runtime is None:
        return original(*args, **kwargs)
    waiting = runtime.mesh.context.waiting
    before = waiting.called_at
    waiting.called_at = before or waiting.script_line()
    try:
        return original(*args, **kwargs)
    finally:
        waiting.called_at = before


def _registered(module: torch.nn.Module, name: str, value: Any) -> None:
    """Hook of every registered parameter; modules are registered in forwards, too (``self.layers[:n]``)."""
    runtime = current()
    if runtime is not None:
        runtime.progress.registered += 1


def _by_script(closure: Any, optimizer: Any, runtime: Any) -> Any:
    """The closure that a script gave an optimizer is the script's code, in the middle of a step."""

    def run() -> Any:
        with runtime.region.script():
            loss = closure()
        gradients.make_equal(gradients.stepped(optimizer), runtime)
        return loss

    return run


def _steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Pre-hook of every optimizer's step; one that raised before has not left its step."""
    runtime = current()
    if runtime is not None and runtime.models:
        if not getattr(optimizer, "tp_checked", False):
            from tp_plugin.shard.optimizer import check_unprepared

            optimizer.tp_checked = True  # type: ignore[attr-defined]
            check_unprepared(optimizer, runtime)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        runtime.region.enter_optimizer(optimizer, has_closure=closure is not None)
        if closure is not None:
            mine = _by_script(closure, optimizer, runtime)
            return (args, {**kwargs, "closure": mine}) if "closure" in kwargs else ((args[0], mine, *args[2:]), kwargs)
        gradients.make_equal(gradients.stepped(optimizer), runtime)
        if (report := runtime.progress.memory_report) is not None:
            report.before_step(optimizer)
    return None


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Post hook of every optimizer's step: fused kernels change weights without counting in-place versions."""
    runtime = current()
    if runtime is None:
        return
    stepped = {id(parameter) for parameter in gradients.stepped(optimizer)}
    sharded = (tensor for model in runtime.models for tensor in model.index.tensors().values())
    own = next((tensor for tensor in sharded if id(tensor) in stepped), None)
    if own is not None:  # another model's optimizer may step on one rank alone
        runtime.progress.stepped(own.device)
    if (report := runtime.progress.memory_report) is not None:
        report.after_step(optimizer)
    runtime.region.leave_optimizer(optimizer)
    if runtime.models:
        from tp_plugin.shard.optimizer_view import show_states

        show_states(optimizer, runtime.region)


def _like(norm: torch.Tensor, tensors: list[Any]) -> torch.Tensor:
    """The norm of DTensors (FSDP2) is one, as theirs is without us: it multiplies them, and has a ``full_tensor``."""
    split = next((tensor for tensor in tensors if is_split(tensor)), None)
    if split is None:
        return norm
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(norm, split.device_mesh, [Replicate()], run_check=False)  # type: ignore[no-any-return]


class _Replicas:
    """``torch.distributed`` as ``DistributedSampler`` sees it: a TP group is one replica.

    Needs no groups: a sampler may be made before them.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    @staticmethod
    def get_world_size() -> int:
        return dist.get_world_size() // _unit_size()

    @staticmethod
    def get_rank() -> int:
        return process_of(dist.get_rank(), _unit_size())


def _unit_size() -> int:
    runtime = current()
    return runtime.mesh.unit_size if runtime is not None else current_config().unit_size


def _unscale_grads(original: Any, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
    """An inf in one rank's shard is an inf in the model: every rank of the unit must skip the step."""
    found: dict[torch.device, torch.Tensor] = original(*args, **kwargs)
    runtime = current()
    if runtime is not None and runtime.models:
        for tensor in found.values():
            runtime.mesh.unit_for(tensor).all_reduce(held(tensor), dist.ReduceOp.MAX)
    return found
