"""``deepspeed.initialize``: the model is sharded, the DP groups are injected, and ZeRO does the rest."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_plugin.config import environment
from tp_plugin.config.deepspeed import as_mapping, read, without_our_keys
from tp_plugin.config.resolve import current_config, resolve
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines import gradients, launch_report, torch_utils
from tp_plugin.engines.deepspeed import checkpoint, norms, replicas, script_access
from tp_plugin.engines.deepspeed.config import check_batch_sizes, refuse
from tp_plugin.engines.deepspeed.groups import Mpu
from tp_plugin.engines.patching import wrap
from tp_plugin.engines.quantization import refuse_optimizer
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import Runtime, current, current_mesh, require
from tp_plugin.runtime.start import start
from tp_plugin.shard import agree_on_weights, is_sharded, materialize_all_, models_in, parallelize, shard_optimizer
from tp_plugin.tensor import rng

DEFAULTS = {"torch_adam": True, "weight_decay": 0.0}
"""Settings with which torch's Adam is DeepSpeed's, whose weight decay is 0 by default (ops/adam/fused_adam.py)."""


def install(deepspeed: Any) -> None:
    """Patch ``deepspeed``."""
    torch_utils.install()
    wrap(deepspeed, "initialize", _initialize)


def install_engine(engine: Any) -> None:
    """Patch ``deepspeed.runtime.engine``: clipping without ZeRO, checkpoints."""
    norms.install_engine(engine)
    checkpoint.install_engine(engine)
    replicas.install(engine)
    for name in ("backward", "step", "save_checkpoint", "load_checkpoint", "save_16bit_model"):
        wrap(engine.DeepSpeedEngine, name, torch_utils.in_step)


def install_config(config: Any) -> None:
    """Patch ``deepspeed.runtime.config``: batch sizes are those of dp processes."""
    wrap(config.DeepSpeedConfig, "__init__", _config)


def install_hf_config(hf_config: Any) -> None:
    """Patch ``accelerate.utils.deepspeed``: what is incompatible with ``tp_size`` is refused before a load."""
    wrap(hf_config.HfDeepSpeedConfig, "__init__", _hf_config)


def install_zero_init(partition_parameters: Any) -> None:
    """Patch ``zero``: a model is built whole, sharded, and only then partitioned; its readers are told."""
    wrap(partition_parameters.Init, "__init__", _zero_init)
    script_access.install_gathering(partition_parameters)


def _config(original: Any, self: Any, config: Any, mpu: Any = None, *args: Any, **kwargs: Any) -> None:
    mesh = current_mesh()
    original(self, config, Mpu(mesh) if mpu is None and mesh is not None else mpu, *args, **kwargs)


def _hf_config(original: Any, self: Any, config: Any) -> None:
    original(self, config)
    options = _run_config(self.config)
    if options.unit_size > 1:
        refuse(self.config, options)
    self.config = without_our_keys(self.config)


def _zero_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    module = args[0] if args else kwargs.get("module")
    if current_config().unit_size == 1 or module is not None:
        return original(self, *args, **kwargs)  # DeepSpeed partitions the sharded model
    return original(self, enabled=False)


def _initialize(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(original).bind(*args, **kwargs)
    given = call.arguments
    config = _take_config(given)
    if config is None:
        return original(*args, **kwargs)  # DeepSpeed says what is wrong
    options = _run_config(config)
    given["config"] = config = without_our_keys(config)
    if options.unit_size == 1 and any(is_sharded(root) for _, root in models_in(given["model"])):
        mesh = require().mesh  # by tp_plugin.parallelize
        options = replace(options, tp_size=mesh.tp_size, pp_size=mesh.pp_size)
    if options.unit_size == 1:
        return original(*call.args, **call.kwargs)
    refuse(config, options)
    _refuse_arguments(given, options)
    runtime = _join(options)
    with runtime.region.step():
        return _initialize_sharded(original, call, config, options, runtime)


def _initialize_sharded(original: Any, call: Any, config: dict[str, Any], options: RunConfig, runtime: Runtime) -> Any:
    given = call.arguments
    check_batch_sizes(config, options, runtime.mesh.dp_size, warn=runtime.mesh.is_leader)
    model: nn.Module = given["model"]
    if type(model).__name__ in options.leave_whole:
        agree_on_weights(model, runtime.mesh)
        materialize_all_(model)
    else:
        parallelize(model, options.tp_size, options=options)
    optimizer = given.get("optimizer")
    if isinstance(optimizer, torch.optim.Optimizer):
        refuse_optimizer(optimizer, "DeepSpeed")
        shard_optimizer(optimizer, runtime)
    given["mpu"] = Mpu(runtime.mesh)
    _use_torch_adam_on_cpu(config)
    engine, *rest = original(*call.args, **call.kwargs)
    gradients.read_at_once(model.parameters())
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            runtime.region.show_when(parameter, script_access.is_gathered)
    stage = engine.zero_optimization_stage()
    launch_report.announce(runtime, f"DeepSpeed ZeRO {stage}", stage)
    checkpoint.link(engine, options, [root.tp_record for _, root in models_in(model) if is_sharded(root)])
    return (engine, *rest)


def _run_config(config: dict[str, Any]) -> RunConfig:
    """The run's config; what stands in the DeepSpeed config only is made known to the other engines."""
    resolved = resolve(environment=environment.read(), deepspeed=read(config, "the DeepSpeed config"))
    if resolved != current_config():
        environment.publish(resolved.as_written())
    return resolved


def _take_config(given: dict[str, Any]) -> dict[str, Any] | None:
    """The config among the arguments, as a mapping of our own; the other places are emptied."""
    script = given.get("args")
    named = [given.get("config"), given.get("config_params"), getattr(script, "deepspeed_config", None)]
    present = [value for value in named if value is not None]
    if len(present) != 1 or (found := as_mapping(present[0])) is None:
        return None
    given.pop("config_params", None)
    if getattr(script, "deepspeed_config", None) is not None:
        given["args"] = copy.copy(script)
        given["args"].deepspeed_config = None
    return dict(found)


def _refuse_arguments(given: dict[str, Any], options: RunConfig) -> None:
    if given.get("mpu") is not None:
        raise TPError(
            f"deepspeed.initialize was given an mpu and {options.sizes}, which brings its own; pass one of them"
        )
    if given.get("mesh_param") is not None:
        raise TPError(f"mesh_param (Ulysses) is incompatible with {options.sizes}; remove one of them")
    model = given.get("model")
    if any("PipelineModule" in base.__name__ for base in type(model).__mro__):
        raise TPError(
            f"{type(model).__name__} is a PipelineModule, whose stages DeepSpeed spreads over the world itself; "
            f"pipeline parallelism is incompatible with {options.sizes}"
        )


def _join(options: RunConfig) -> Runtime:
    """The Runtime of this run. Collective over the world at its first call."""
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    on_cpu = get_accelerator().device_name() == "cpu"
    comm.init_distributed(dist_backend="gloo" if on_cpu else get_accelerator().communication_backend_name())
    joined = current() is not None
    runtime = start(options, device_type=get_accelerator().device_name())
    if not joined:
        rng.synchronize(runtime.mesh.unit_cpu)
    return runtime


def _use_torch_adam_on_cpu(config: dict[str, Any]) -> None:
    """On CPU, DeepSpeed's Adam is a C++ extension compiled at start-up; torch's computes the same."""
    from deepspeed.accelerator import get_accelerator

    optimizer = config.get("optimizer")
    if get_accelerator().device_name() != "cpu" or not isinstance(optimizer, dict):
        return
    if str(optimizer.get("type")).lower() in ("adam", "adamw"):
        config["optimizer"] = {**optimizer, "params": {**DEFAULTS, **optimizer.get("params", {})}}
