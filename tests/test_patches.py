"""The installed libraries still look as the patches expect; each failure says what moved."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
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

from tp_plugin.engines.accelerate.operations import DPScopedDist


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
    unknown = distributed_calls(module) - set(DPScopedDist.HANDLED)
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
    for name in ("is_world_process_zero", "_save_rng_state", "_load_best_model", "_save_checkpoint"):
        assert name in vars(transformers.Trainer), f"Trainer lost {name}"
    assert "generate" in vars(transformers.GenerationMixin)
    assert list(inspect.signature(transformers.Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    assert "os.path.exists(best_checkpoint_dir)" in source
    state = source.index("save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))")
    assert all(source.index(name) < state for name in ("save_model(", "_save_optimizer_and", "_save_scaler(", "_rng_"))


def test_checkpoints_of_others_are_left_alone(tmp_path: Path) -> None:
    """A script may call folders of ``save_state`` so; Trainer's are complete with ``trainer_state.json``."""
    from transformers.trainer_utils import get_last_checkpoint

    from tp_plugin.engines.trainer import _get_last_checkpoint

    for number in (5, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert _get_last_checkpoint(get_last_checkpoint, tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
    with pytest.warns(UserWarning, match="checkpoint-10 is not complete"):
        assert _get_last_checkpoint(get_last_checkpoint, tmp_path) == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").rename(tmp_path / "checkpoint-5" / "training_args.bin")
    with pytest.warns(UserWarning, match="there is no other"):
        assert _get_last_checkpoint(get_last_checkpoint, tmp_path) is None


def test_a_jit_checkpoint_is_asked_for_in_four_places() -> None:
    from transformers import trainer_jit_checkpoint as jit

    places = {name for name, f in vars(jit.JITCheckpointCallback).items() if "is_checkpoint_requested" in _source(f)}
    assert places == {"on_pre_optimizer_step", "on_step_begin", "on_step_end", "on_epoch_end"}
    assert "self.trainer._save_checkpoint(self.trainer.model, trial=None)" in _source(
        jit.CheckpointManager.execute_jit_checkpoint
    )


def _source(function: Any) -> str:
    return inspect.getsource(function) if inspect.isfunction(function) else ""


EVERYTHING = """
import json, os, sys
os.environ["TP_PLUGIN_TP_SIZE"] = "2"
from tp_plugin.launch import worker
worker.register()
import accelerate, accelerate.checkpointing, deepspeed, peft, transformers, transformers.trainer, trl.trainer.utils
import transformers.trainer_jit_checkpoint
import transformers.generation.utils, deepspeed.runtime.bf16_optimizer, deepspeed.runtime.fp16.unfused_optimizer
import deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.stage_1_and_2, deepspeed.utils.zero_to_fp32
import torch.utils.data.distributed, torch.distributed.fsdp, torch.distributed.checkpoint.state_dict
import trl.trainer.distillation_trainer, trl.trainer.grpo_trainer, trl.trainer.rloo_trainer, trl.trainer.sft_trainer
import importlib.util
there = {module for module in worker._PATCHES if importlib.util.find_spec(module.split(".")[0])}
import huggingface_hub.hub_mixin, accelerate.local_sgd
if importlib.util.find_spec("bitsandbytes") is None:
    there.discard("peft.tuners.lora.bnb")
for optional in ("peft.tuners.lora.bnb", "sentence_transformers.util.distributed", "pylate.utils.distributed",
        "liger_kernel.transformers.monkey_patch", "liger_kernel.chunked_loss"):
    if optional in there:
        importlib.import_module(optional)
missing = sorted(there - set(sys.modules))
from tp_plugin.engines import patching
taken = list(patching._originals)
now = lambda owner, name: vars(owner).get(name, patching.INHERITED)
inactive = [f"{owner}.{name}" for owner, name, original in taken if now(owner, name) is original]
patching.unpatch_all()
first = {}
for owner, name, original in taken:
    first.setdefault((id(owner), name), (owner, name, original))
left = [f"{owner}.{name}" for owner, name, original in first.values() if now(owner, name) is not original]
worker.register()
again = len(patching._originals)
with patching.taken_back():
    patching.patch(json, "loads", print)
patching_keeps = json.loads is not print and len(patching._originals) == again
print(json.dumps({"missing": missing, "inactive": inactive, "left": left, "count": len(taken),
    "again": again, "keeps": patching_keeps}))
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
    assert found["again"] == found["count"] >= 80, "patches that were taken back come back"
    assert found["keeps"]


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


def test_the_loader_takes_tensors_where_it_takes_slices_of_files() -> None:
    import transformers.core_model_loading as core
    import transformers.modeling_utils as modeling

    loader = modeling.PreTrainedModel._load_pretrained_model
    assert list(inspect.signature(loader).parameters)[:4] == ["model", "state_dict", "checkpoint_files", "load_config"]
    for field in ("device_map", "hf_quantizer", "weight_mapping", "disable_mmap"):
        assert field in modeling.LoadStateDictConfig.__dataclass_fields__, f"LoadStateDictConfig lost {field}"
    assert "merged_state_dict = state_dict" in inspect.getsource(loader)
    source = inspect.getsource(core._materialize_copy)
    assert "tensor[...]" in source and ".to(device=device, dtype=dtype)" in source
    names = list(inspect.signature(core.rename_source_key).parameters)[:5]
    assert names == ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert "not isinstance(param_value, torch.nn.Parameter)" in inspect.getsource(core.set_param_for_module)
    assert callable(modeling._is_on_hf_mount)


def test_fsdp2_makes_its_parameters_where_we_think() -> None:
    from accelerate.utils import fsdp_utils
    from torch.distributed import fsdp
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param

    param = _fsdp_param.FSDPParam
    assert "self._unsharded_param = nn.Parameter(" in inspect.getsource(param.init_unsharded_param)
    assert inspect.getsource(_fsdp_param).count("self._unsharded_param = ") == 1, "FSDP2 gathers into another parameter"
    for name in ("set_custom_all_gather", "set_custom_reduce_scatter"):
        assert hasattr(fsdp.FSDPModule, name), f"FSDPModule lost {name}"
    for name in ("DefaultAllGather", "DefaultReduceScatter"):
        assert list(inspect.signature(getattr(_fsdp_collectives, name).__call__).parameters)[1:3] == [
            "output_tensor", "input_tensor"
        ]  # fmt: skip
    from transformers.modeling_utils import PreTrainedModel

    left = inspect.getsource(PreTrainedModel._move_missing_keys_from_meta_to_device)
    assert "if is_fsdp_enabled() and not is_local_dist_rank_0()" in left, "who makes up what a checkpoint lacks?"
    prepare = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    assert "from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard" in prepare
    assert "cpu_ram_efficient_loading" in prepare and "fsdp2_prepare_model(self, model)" in inspect.getsource(
        accelerate.Accelerator._prepare_fsdp2
    )
    for name in ("get", "set"):
        for kind in ("model_state_dict", "optimizer_state_dict", "state_dict"):
            assert f"{name}_{kind}" in vars(state_dict)
    assert "__create_write_items__" in inspect.getsource(torch.distributed.checkpoint.planner_helpers)


def test_save_state_is_where_we_think() -> None:
    import accelerate.checkpointing

    save, load = (inspect.getsource(getattr(accelerate.Accelerator, name)) for name in ("save_state", "load_state"))
    assert "save_accelerator_state(\n" in save and "shutil.rmtree(folder)" in save, "it names and deletes elsewhere"
    assert "self.project_configuration.automatic_checkpoint_naming" in save and "self.save_iteration" in save
    assert '"step" in override_attributes' in load

    source = inspect.getsource(accelerate.checkpointing)
    assert source.count("torch.save(") == 3, "state files are written elsewhere"
    from transformers import Trainer

    assert list(inspect.signature(Trainer._load_rng_state).parameters) == ["self", "checkpoint"]


def test_trl_and_peft_keep_what_is_replaced() -> None:
    import peft.tuners.lora.layer as lora
    import trl.trainer.distillation_trainer as distillation
    import trl.trainer.utils as utils
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

    from tp_plugin.engines import trl as engine

    assert OPTIONAL_OUTPUTS == engine.OPTIONAL
    ours = list(inspect.signature(engine._LogProbs.apply).parameters)[1:]
    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:] == ours
    assert inspect.getsource(utils).count("_ChunkedLogProbFunction.apply(") == 1
    assert "ChunkedDivergenceFunction.apply(" in inspect.getsource(distillation)
    ours = list(inspect.signature(engine._divergence).parameters)[2:]
    assert list(inspect.signature(distillation.ChunkedDivergenceFunction.forward).parameters)[1:] == ours
    assert "self._embed(x, embedding_A" in inspect.getsource(lora.Embedding.forward)
