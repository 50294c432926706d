"""The installed libraries still look as the patches expect; each failure says what moved."""

from __future__ import annotations

import ast
import inspect
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
