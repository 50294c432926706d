"""Saves: gathered by collectives if all ranks came, and waited for beyond the timeout of the groups."""

from __future__ import annotations

import contextlib
import datetime
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import ledger
from fresh import scripts
from models import batch, build, config_for
from test_loading import patched
from workers import run

PATIENCE = 4
"""Seconds that torch grants a collective."""

LONG = 10.0
"""Seconds that a file takes."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    build(config_for("llama"), 0).save_pretrained(folder)
    return folder


# --- how shards come together ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetches() -> Iterator[list[Any]]:
    """What is read by the transport meanwhile."""
    from tp_plugin.runtime.transport import PeerTransport

    found: list[Any] = []
    fetch = PeerTransport.fetch

    def noted(self: Any, rank: int, *request: Any, **kwargs: Any) -> torch.Tensor:
        found.append(request)
        return fetch(self, rank, *request, **kwargs)

    with unittest.mock.patch.object(PeerTransport, "fetch", noted):
        yield found


def gathered_case(folder: str, way: str) -> dict[str, Any]:
    from tp_plugin.engines import transformers as engine
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    sharded: Any = build(config_for("llama"), 0)
    parallelize(sharded, 2)
    rank, sessions = torch.distributed.get_rank(), sharded.tp_record.runtime.sessions
    with patched(engine), fetches() as fetched:
        if way == "around":  # as Trainer: only the leader saves, in a call of all
            with sessions.together("a checkpoint"):
                if rank == 0:
                    sharded.save_pretrained(folder, max_shard_size="40KB")
        elif way == "all" or rank == 0:
            sharded.save_pretrained(folder, max_shard_size="40KB")
    torch.distributed.barrier()
    layouts = sharded.tp_record.plan.layouts
    split = [(layouts[name], p) for name, p in sharded.named_parameters() if layouts[name].is_sharded]
    return {
        "gathers": ledger["count"]["gather/unit_cpu"],
        "bytes": ledger["bytes"]["gather/unit_cpu"],
        "split": len(split),
        "share": sum(max(layout.local_numel(r) for r in range(2)) * p.itemsize for layout, p in split),
        "fetched": len(fetched),
    }


@pytest.mark.parametrize("way", ["all", "around", "alone"])
def test_one_collective_a_tensor_if_all_came(way: str, tmp_path: Path) -> None:
    leader, peer = run(2, gathered_case, str(tmp_path / "saved"), way)
    build(config_for("llama"), 0).save_pretrained(tmp_path / "plain", max_shard_size="40KB")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    for case in (leader, peer):
        together = way != "alone"
        assert case["gathers"] == together * case["split"], case
        assert case["bytes"] == together * case["share"], case
    assert peer["fetched"] == 0 and leader["fetched"] == (way == "alone") * leader["split"]


# --- how long they are waited for -----------------------------------------------------------------------------------


def begin(folder: str) -> tuple[Any, Any, Any]:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from transformers import AutoModelForCausalLM

    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=PATIENCE), backend="gloo")
    accelerator = Accelerator(cpu=True, kwargs_handlers=[timeout])
    model = AutoModelForCausalLM.from_pretrained(folder)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def step(accelerator: Any, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(**batch(97, 0)).loss)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def slow_files() -> Iterator[None]:
    import accelerate.utils.other
    import transformers.modeling_utils

    with contextlib.ExitStack() as stack:
        for module in (accelerate.utils.other, transformers.modeling_utils):
            quick = module.safe_save_file

            def slow(*args: Any, quick: Any = quick, **kwargs: Any) -> None:
                time.sleep(LONG)
                quick(*args, **kwargs)

            stack.enter_context(unittest.mock.patch.object(module, "safe_save_file", slow))
        yield


def long_script(folder: str, output: str, way: str) -> None:
    everything = accelerator, model, _ = begin(folder)
    step(*everything)
    inside = accelerator.unwrap_model(model)
    with slow_files():
        if way == "save_state":
            accelerator.save_state(output)
        elif way == "all" or accelerator.is_main_process:
            inside.save_pretrained(output)
    if way == "alone, waited for":
        accelerator.wait_for_everyone()
    step(*everything)  # where the others wait, in a unit


LONG_SAVES = [(2, "alone"), (4, "alone, waited for"), (2, "all"), (2, "save_state"), (4, "save_state")]


@pytest.mark.parametrize(("world", "way"), LONG_SAVES)
def test_a_save_outlasts_the_timeout(model_folder: str, world: int, way: str, tmp_path: Path) -> None:
    output = tmp_path / "saved"
    for ended in scripts(world, long_script, model_folder, str(output), way, folder=tmp_path):
        assert ended.code == 0, ended.said
    assert (output / "model.safetensors").exists()


def stuck_script(folder: str, output: str) -> None:
    everything = accelerator, model, _ = begin(folder)
    step(*everything)
    if accelerator.is_main_process:
        with slow_files():
            accelerator.unwrap_model(model).save_pretrained(output)
    step(*everything)


def test_nobody_waits_for_a_save_that_does_not_go_on(model_folder: str, tmp_path: Path) -> None:
    options = {"TP_PLUGIN_OPTIONS": '{"save_timeout": 1}'}
    ended = scripts(2, stuck_script, model_folder, str(tmp_path / "saved"), folder=tmp_path, **options)
    assert ended[1].code == 1
    assert "rank 1 lost other ranks in all_gather of the unit_cpu group" in ended[1].said
    assert f"Timed out after waiting {PATIENCE} s" in ended[1].said


def trainer_script(folder: str, output: str) -> None:
    import transformers
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    PartialState(cpu=True, backend="gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}] * 16
    arguments = transformers.TrainingArguments(
        output, report_to=[], use_cpu=True, max_steps=3, save_steps=2, per_device_train_batch_size=2,
        disable_tqdm=True,
    )  # fmt: skip
    with slow_files():
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()


@pytest.mark.parametrize("world", [2, 4])
def test_trainers_checkpoint_outlasts_the_timeout(model_folder: str, world: int, tmp_path: Path) -> None:
    for ended in scripts(world, trainer_script, model_folder, str(tmp_path / "out"), folder=tmp_path):
        assert ended.code == 0, ended.said
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").exists()
