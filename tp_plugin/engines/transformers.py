"""transformers: refusals before any weight is loaded, saving, and what a model says of itself."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any
from zlib import crc32

from torch import nn

from tp_plugin.config.resolve import current_config
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines import loading, saving
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.quantization import check_quantization, own_device
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.errors import TPError
from tp_plugin.policy import check_config, load, policy_for
from tp_plugin.runtime.digests import digests
from tp_plugin.runtime.runtime import current_mesh
from tp_plugin.runtime.sync_points import GENERATE, Request
from tp_plugin.shard import is_sharded
from tp_plugin.shard.params import plain_name
from tp_plugin.tensor import rng


def install(modeling_utils: Any) -> None:
    """Patch ``PreTrainedModel``."""
    model = modeling_utils.PreTrainedModel
    patch(model, "from_pretrained", _from_pretrained(vars(model)["from_pretrained"].__func__))
    loading.install(modeling_utils)
    wrap(model, "__init__", _init)
    # ZeRO-3 partitions what `deepspeed.initialize` has sharded, not what is being loaded
    wrap(modeling_utils, "is_deepspeed_zero3_enabled", lambda original: _is_off() and original())
    saving.install(modeling_utils)
    wrap(model, "resize_token_embeddings", _resize_token_embeddings)
    if "num_parameters" in vars(model):
        wrap(model, "num_parameters", _num_parameters)
    else:  # it lives in a mixin
        wrap(modeling_utils.ModuleUtilsMixin, "num_parameters", _num_parameters)


def install_generation(generation: Any) -> None:
    """Patch ``GenerationMixin``."""
    wrap(generation.GenerationMixin, "generate", _generate)
    wrap(generation.GenerationMixin, "generate", in_step)


def _generate(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate on all ranks together; the main process alone takes its peers along for the whole call."""
    mesh = current_mesh()
    record: Any = getattr(self, "tp_record", None)
    sync_points = record.runtime.sync_points if mesh is not None and record is not None else None
    if sync_points is None or sync_points.helping:
        return original(self, *args, **kwargs)
    call = crc32(repr(sorted(digests(args, kwargs).items())).encode())
    values = [2 * self.training, record.number, call, rng.fingerprint()]
    heard_here = {name: value for name, value in kwargs.items() if name != "streamer"}  # it changes no token
    rows = sync_points.rendezvous(GENERATE, values, lambda: Request.of("generate", self, args, heard_here))
    if any(row[3] != values[3] for row in rows):
        rng.synchronize(mesh.unit_cpu)  # now: an assistant that is not sharded draws before the first forward meets
    before = sync_points.helping, sync_points.generating
    sync_points.helping, sync_points.generating = len(rows) < mesh.unit_size, True
    try:
        return original(self, *args, **kwargs)
    finally:
        sync_points.helping, sync_points.generating = before


_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps over all devices in sight. A process has one of its own; the others in sight are those of its peers.

TRL asks for ``auto`` on devices that are neither GPUs nor CPUs.
"""


def _from_pretrained(original: Any) -> classmethod[Any, Any, Any]:
    @functools.wraps(original)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        # before transformers looks for the quantizer's package, whose absence would be the wrong message
        config: Any = kwargs.get("config")
        quantized = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        path = Path(str(name)) / "config.json"
        if config is None and path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
            quantized = quantized or written.get("quantization_config")
            config = written.get("model_type")
        if quantized is not None:
            check_quantization(config, quantized, current_config())
        if isinstance(kwargs.get("device_map"), str) and kwargs["device_map"] in _SPREADS and not _is_off():
            kwargs["device_map"] = None
        if quantized is not None and not _is_off():
            kwargs["device_map"] = own_device(kwargs.get("device_map"))
        return original(cls, name, *args, **kwargs)

    return classmethod(from_pretrained)


def _init(original: Any, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    # from_pretrained and from_config both come here, before any weight is read
    check_before_load(config, current_config())
    original(self, config, *args, **kwargs)


def _is_off() -> bool:
    return current_config().unit_size == 1


def check_before_load(config: Any, options: RunConfig) -> None:
    """Refuse what cannot be trained tensor-parallel, while nothing is lost.

    Raises:
        PolicyError: no policy, or more ranks than heads.
        TPError: a quantized model that cannot be cut, or a world that ``tp_size`` does not divide.
    """
    model_type = getattr(config, "model_type", None)
    if options.unit_size == 1 or model_type in options.leave_whole:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % options.unit_size:
        by = "tp_size x pp_size" if options.pp_size > 1 else "tp_size"
        raise TPError(
            f"{options.sizes} does not divide the world of {world} processes (num_processes); write "
            f"num_processes = {by} x data-parallel size"
        )
    policy = load(options.policy) if options.policy else policy_for(config)
    if policy.towers and model_type not in policy.model_types:
        policy = policy_for(config)  # a tower of the model that the configured policy is for
    check_config(config, policy, options.tp_size, options.leave_whole)
    if getattr(config, "quantization_config", None) is not None:
        check_quantization(config, config.quantization_config, options)


def _resize_token_embeddings(original: Any, self: Any, new_num_tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
    if is_sharded(self) and new_num_tokens is not None:
        raise TPError(
            f"resize_token_embeddings({new_num_tokens}) was called on a model that is already sharded; call it before "
            "accelerator.prepare"
        )
    return original(self, new_num_tokens, *args, **kwargs)


def _num_parameters(original: Any, self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    count: int = original(self, only_trainable, exclude_embeddings)
    if not is_sharded(self):
        return count
    # the same parameters, each counted with its whole shape
    embeddings = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
    return sum(
        math.prod(self.tp_record.plan.layouts[plain_name(name)].features.shape)
        for name, parameter in self.named_parameters()
        if id(parameter) not in embeddings and (parameter.requires_grad or not only_trainable)
    )
