"""The installed libraries still look as the patches expect; each failure says what moved."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from typing import Any

import accelerate
import accelerate.checkpointing
import accelerate.data_loader
import accelerate.state
import accelerate.utils.operations
import accelerate.utils.random
import pytest
import torch
from torch.nn.utils import clip_grad

from tp_plugin.engines.accelerate.operations import OverDP


def distributed_calls(module: Any) -> set[str]:
    """Names used as ``torch.distributed.NAME`` in a module's source."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "distributed"
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "torch"
    }


@pytest.mark.parametrize("module", [accelerate.utils.operations, accelerate.utils.random])
def test_accelerate_calls_only_collectives_that_are_redirected(module: Any) -> None:
    unknown = distributed_calls(module) - set(OverDP.HANDLED)
    assert not unknown, f"{module.__name__} now calls torch.distributed.{unknown}: over which group should it go?"


def test_loaders_are_classes_of_their_own() -> None:
    for cls in (accelerate.data_loader.DataLoaderShard, accelerate.data_loader.DataLoaderDispatcher):
        assert "__iter__" in vars(cls), f"{cls.__name__} no longer defines __iter__"
    loader = accelerate.data_loader.DataLoaderShard([1])
    for name in ("begin", "end", "end_of_dataloader", "remainder", "iteration", "device"):
        assert hasattr(loader, name), f"DataLoaderShard lost {name}"


def test_state_keeps_the_names_that_are_patched() -> None:
    state = vars(accelerate.state.PartialState)
    for name in (
        "__init__", "wait_for_everyone", "is_main_process", "is_last_process", "on_main_process", "on_process",
        "on_local_main_process", "on_last_process", "on_local_process",
    ):  # fmt: skip
        assert name in state, f"PartialState lost {name}"


def test_clip_grad_norm_goes_through_the_private_norm() -> None:
    assert "_get_total_norm(" in inspect.getsource(clip_grad.clip_grad_norm_), (
        "clip_grad_norm_ computes its norm elsewhere"
    )


def test_grad_scaler_finds_infs_in_one_place() -> None:
    assert "_unscale_grads_(" in inspect.getsource(torch.amp.GradScaler.unscale_)
    assert "_unscale_grads_" in vars(torch.amp.GradScaler)


def test_every_model_passes_the_patched_init() -> None:
    from transformers import PreTrainedModel

    assert list(inspect.signature(PreTrainedModel.__init__).parameters)[:2] == ["self", "config"]
    assert list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[1:4] == [
        "save_directory",
        "is_main_process",
        "state_dict",
    ]


def test_ddp_handler_still_gives_the_keywords() -> None:
    source = inspect.getsource(accelerate.Accelerator.prepare_model)
    assert source.count("self.ddp_handler.to_kwargs()") == source.count("DistributedDataParallel(") == 2


def test_trainer_keeps_the_names_that_are_patched() -> None:
    import transformers.trainer
    import transformers.trainer_pt_utils
    import transformers.training_args

    for module in (transformers.trainer, transformers.trainer_pt_utils, transformers.training_args):
        assert module.dist is not None, f"{module.__name__} no longer imports torch.distributed as dist"
    for name in ("should_save", "should_log", "main_process_first"):
        assert name in vars(transformers.TrainingArguments), f"TrainingArguments lost {name}"
    for name in ("is_world_process_zero", "_save_rng_state", "_load_best_model"):
        assert name in vars(transformers.Trainer), f"Trainer lost {name}"
    assert "generate" in vars(transformers.GenerationMixin)


EVERYTHING = """
import json, os, sys
os.environ["TP_PLUGIN_TP_SIZE"] = "2"
from tp_plugin.launch import worker
worker.register()
import accelerate, accelerate.checkpointing, deepspeed, peft, transformers, transformers.trainer
import transformers.generation.utils, deepspeed.runtime.bf16_optimizer, deepspeed.runtime.fp16.unfused_optimizer
import deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.stage_1_and_2, deepspeed.utils.zero_to_fp32
import torch.utils.data.distributed
missing = [module for module in worker._PATCHES if module not in sys.modules]
from tp_plugin.engines import patching
taken = list(patching._originals)
inactive = [f"{owner}.{name}" for owner, name, original in taken if vars(owner)[name] is original]
patching.unpatch_all()
first = {}
for owner, name, original in taken:
    first.setdefault((id(owner), name), (owner, name, original))
left = [f"{owner}.{name}" for owner, name, original in first.values() if vars(owner)[name] is not original]
print(json.dumps({"missing": missing, "inactive": inactive, "left": left, "count": len(taken)}))
"""


def test_every_patch_finds_its_place_and_can_be_taken_back() -> None:
    """All libraries, DeepSpeed included, imported in a process with a ``tp_size``."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    run = subprocess.run(
        [sys.executable, "-c", EVERYTHING], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["missing"] == found["inactive"] == found["left"] == []
    assert found["count"] >= 80


def test_deepspeed_reads_the_mpu_where_we_think() -> None:
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.utils import groups

    assert "initialize_sequence_parallel" in inspect.getsource(groups._get_data_parallel_group)
    one = stage_1_and_2.DeepSpeedZeroOptimizer
    for name in ("params_in_partition", "first_offset", "single_partition_of_fp32_groups", "grad_position"):
        assert name in inspect.getsource(one), f"ZeRO 1 and 2 lost {name}"
    three = stage3.DeepSpeedZeroOptimizer_Stage3
    for name in ("norm_for_param_grads", "fp32_partitioned_groups_flat", "grad_position", "averaged_gradients"):
        assert name in inspect.getsource(three), f"ZeRO 3 lost {name}"
    source = inspect.getsource(engine.DeepSpeedEngine._load_checkpoint)
    assert "_get_all_ckpt_names" in source and "self.checkpoint_engine" in source
    assert "clip_grad_norm_(parameters=" in inspect.getsource(engine.DeepSpeedEngine.clip_fp32_gradients)
