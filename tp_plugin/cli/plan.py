"""``tp-plugin plan``: which layouts of a training fit a cluster, which is the fastest, and why."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tp_plugin.cli.models import build, read_config
from tp_plugin.errors import TPError
from tp_plugin.estimate.job import Candidate, Cluster, Job, PlanError
from tp_plugin.estimate.search import Planner
from tp_plugin.estimate.timing import Rates
from tp_plugin.policy import policy_for

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def plan(config: Any, cluster: Cluster, job: Job, *, rates: Rates | None = None) -> list[Candidate]:
    """All layouts of a training, best first.

    Args:
        config: a transformers config, or what ``tp-plugin verify`` takes: a model type, config.json or folder.
        cluster: what it is to run on.
        job: what is to be trained, and what of the layout is fixed.
        rates: constants measured on the cluster; default the figures of the hardware table, which are good for ranking.

    Raises:
        TPError: something asked for cannot be done; the message says what could.
    """
    return planner(config, cluster, job, rates=rates).candidates()


def planner(config: Any, cluster: Cluster, job: Job, *, rates: Rates | None = None) -> Planner:
    """What answers about one model."""
    config = read_config(config) if isinstance(config, str) else config
    config = type(config).from_dict(config.to_dict())  # the caller's stays as it is
    text = config.get_text_config()
    for each in {id(c): c for c in (config, text)}.values():
        each._attn_implementation = job.attention
        if hasattr(each, "use_cache"):
            each.use_cache = False
    policy = policy_for(config)
    model = meta_model(config, job)
    root = model.base_model.model if job.lora_rank else model  # type: ignore[union-attr]
    return Planner(root, policy, job, cluster, rates or Rates(), example(root))  # type: ignore[arg-type]


def meta_model(config: Any, job: Job) -> nn.Module:
    """The model of ``config`` on the meta device, in the job's dtype, with its adapters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(TORCH[job.dtype])
    try:
        model = build(config, meta=True)
    except (TypeError, ValueError) as error:
        if isinstance(error, TPError):
            raise
        raise TPError(f"the config makes no model ({error}); name a config.json or a checkpoint") from error
    finally:
        torch.set_default_dtype(before)
    return _adapted(model, job) if job.lora_rank else model


def _adapted(model: nn.Module, job: Job) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise PlanError("--lora needs peft: pip install 'tp-plugin[peft]'") from error
    targets = job.lora_targets if isinstance(job.lora_targets, str) else list(job.lora_targets)
    with torch.device("meta"):
        found: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=job.lora_rank, target_modules=targets))  # type: ignore[arg-type]
    return found


def example(model: Any) -> dict[str, Any]:
    """One sample's arguments of models that take more than tokens; else nothing."""
    from tp_plugin.cli.random_batch import batch

    wanted = inspect.signature(model.forward).parameters
    if not {"pixel_values", "input_features"} & set(wanted):
        return {}
    made = batch(model, 0)
    return {name: (v[:1].to("meta") if isinstance(v, torch.Tensor) else v) for name, v in made.items()}
