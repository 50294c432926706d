"""A run that goes on, as the plan sees it: its layout, what a rank holds of its parameters, and its model on shapes."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tp_plugin.config.run_config import RunConfig
from tp_plugin.estimate.hardware import GPUS, Gpu
from tp_plugin.estimate.job import Cluster, Job, Layout
from tp_plugin.estimate.search import Planner
from tp_plugin.estimate.states import Held
from tp_plugin.estimate.timing import Rates
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import load, policy_for
from tp_plugin.shard.model_state import ModelState

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
OPTIMIZERS = {"Adam": "adamw", "AdamW": "adamw", "FusedAdam": "adamw", "Adafactor": "adafactor"}
OPTIMIZERS |= {"AdamW8bit": "adamw_8bit", "Adam8bit": "adamw_8bit"}
"""Class of an optimizer → what the plan calls it; of others it does not know the states."""


@dataclass
class Batch:
    """Arguments of a training forward, as shapes.

    Attributes:
        size: samples.
        sequence: tokens of one.
        values: by name, tensors on the meta device of one sample.
    """

    size: int = 1
    sequence: int = 1
    values: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """Of what ``model`` is called with."""
        named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)
        tensors = [v for v in named.values() if isinstance(v, torch.Tensor) and v.dim() >= 2]
        if not tensors:
            return Batch()
        size, sequence = tensors[0].shape[:2]

        def shape(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            dims = (1, *value.shape[1:]) if value.dim() and value.shape[0] == size else value.shape
            return torch.empty(dims, dtype=value.dtype, device="meta")

        plain = (torch.Tensor, bool, int, float, str)
        return Batch(size, sequence, {name: shape(v) for name, v in named.items() if isinstance(v, plain)})


def engine_of(state: ModelState, zero_stage: int) -> str:
    """What does data parallelism, as the plan calls it."""
    if zero_stage:
        return f"zero{zero_stage}"
    return "fsdp2" if any(map(is_split, state.index.tensors().values())) else "ddp"


def held_by(state: ModelState) -> list[Held]:
    """What this rank of the unit holds of a model's parameters, from its layout record."""
    rank, layouts = state.mesh.unit.rank, state.index.layouts
    return [
        Held((), layouts[name].local_shape(rank), tensor.element_size(), tensor.requires_grad)
        for name, tensor in state.index.tensors().items()
        if rank not in layouts[name].absent
    ]


def layout_of_run(
    config: RunConfig, mesh: Mesh, engine: str, batch: Batch, micro_batches: int, checkpointing: bool
) -> Layout:
    """As the run lies on its ranks. A pipeline cuts each batch itself."""
    cut = min(batch.size, config.pipeline_microbatches or 4 * mesh.pp_size) if mesh.pp_size > 1 else 1
    return Layout(
        mesh.tp_size, mesh.pp_size, mesh.dp_size, -(-batch.size // cut), micro_batches * cut, engine, checkpointing,
        config.sequence_parallel and mesh.tp_size > 1,
    )  # fmt: skip


def planner_of_run(
    model: Any, state: ModelState, config: RunConfig, layout: Layout, batch: Batch, optimizer: str, memory: float
) -> Planner:
    """What answers about the run. The caller has put aside the Runtime, for the model is built and run as any other.

    Args:
        model: what is trained.
        memory: bytes of one device.
    """
    root = rebuilt(model, {name: tensor.requires_grad for name, tensor in state.index.tensors().items()})
    size = layout.micro_batch * layout.accumulation * layout.dp
    job = Job(
        sequence=batch.sequence, global_batch=size, lora_rank=int(hasattr(model, "peft_config")),
        optimizer=optimizer or "adamw", dtype=DTYPES.get(compute_dtype(model), "fp32"),
    )  # fmt: skip
    ranks = layout.tp * layout.pp * layout.dp
    per_node = torch.accelerator.device_count() if torch.accelerator.is_available() else ranks
    per_node = per_node if ranks % max(per_node, 1) == 0 else ranks
    gpu = Gpu(**{**vars(GPUS["h100"]), "name": "of this rank", "memory": memory, "source": "the device"})
    policy = load(config.policy) if config.policy else policy_for(model.config)
    return Planner(root, policy, job, Cluster(ranks, per_node, gpu), Rates(), batch.values, replace(config, pp_size=1))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the forward: that of the weights, or what FSDP2 gathers them in."""
    fsdp = getattr(model, "_get_fsdp_state", None)
    gathered = getattr(getattr(fsdp(), "_mp_policy", None), "param_dtype", None) if fsdp else None
    found = gathered or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return found


def rebuilt(model: Any, trained: Mapping[str, bool]) -> nn.Module:
    """A model like ``model`` as it was before it was sharded, on the meta device, with its adapters.

    Args:
        trained: name of a parameter → whether it has a gradient.
    """
    config = copy.deepcopy(model.config)
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        each._attn_implementation = "eager" if model.config._attn_implementation == "eager" else "sdpa"
        if hasattr(each, "use_cache"):
            each.use_cache = False
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(model))
    try:
        with torch.device("meta"):
            root: nn.Module = _plain_class(model)(config)
            if adapters := getattr(model, "peft_config", None):
                from peft import inject_adapter_in_model

                for name, settings in adapters.items():
                    root = inject_adapter_in_model(copy.deepcopy(settings), root, name)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    return root


def _plain_class(model: nn.Module) -> Any:
    """Without FSDP2's class that was put in front of it."""
    return next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))


@contextmanager
def numbers_kept() -> Iterator[None]:
    """What is drawn inside is not drawn from the script's random numbers."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
