"""Accelerate's save_state under tp x dp: resumed to the last bit, by the main process alone, with faults; exported."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build, config_for
from workers import run

MODEL = {"tie_word_embeddings": False}


@contextlib.contextmanager
def accelerated(tp: int) -> Iterator[None]:
    """A worker of Accelerate with ``tp_size``, for one case."""
    from tp_plugin.engines import patching, torch_utils
    from tp_plugin.launch.worker import _PATCHES
    from tp_plugin.runtime.start import stop

    names = [name for name in _PATCHES if name.startswith("accelerate.") and "deepspeed" not in name]
    modules = {name: importlib.import_module(name) for name in names}
    modules["accelerate.state"].AcceleratorState._reset_state(True)
    stop()
    os.environ |= {"TP_PLUGIN_TP_SIZE": str(tp), "ACCELERATE_USE_CPU": "true"}
    before = len(patching._originals)
    mine: list[Any] = []
    try:
        torch_utils.install()
        for name, module in modules.items():
            engine, function = _PATCHES[name]
            getattr(importlib.import_module(engine), function)(module)
        mine = patching._originals[before:]  # not those of a library that is imported meanwhile
        yield
    finally:
        for owner, name, original in reversed(mine):
            if original is patching.INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
            patching._originals.remove((owner, name, original))
        modules["accelerate.state"].AcceleratorState._reset_state(True)
        modules["accelerate.state"].GradientState._reset_state()


class Script:
    """What a training script sets up."""

    def __init__(self, root: str, seed: int, automatic: bool = False, limit: int | None = None, **further: bool):
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

        project = ProjectConfiguration(root, automatic_checkpoint_naming=automatic, total_limit=limit)
        # (without it Accelerate itself shuffles otherwise after load_state, on more than one process)
        loading = DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader="stateful" in further)
        self.accelerator = Accelerator(project_config=project, gradient_accumulation_steps=2, dataloader_config=loading)
        if "scaled" in further:  # as with fp16, which Accelerate takes on a GPU only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        self.config = config_for("llama", **MODEL)
        model = build(self.config, seed=seed)
        set_seed(7)  # a seedable sampler begins with the seed of its run; Accelerate's files do not have it
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        ids = torch.randint(3, self.config.vocab_size, (32, 9), generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(ids, batch_size=2, shuffle=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.model.train()
        torch.rand(seed)  # from where the generators go on is not what a new run would begin with

    def train(self, batches: Iterator[Any], steps: int) -> list[Any]:
        seen = []
        for batch in itertools.islice(batches, steps):
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=batch, labels=batch).loss
                self.accelerator.backward(loss)
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            scale = self.accelerator.scaler and self.accelerator.scaler.get_scale()
            seen.append((batch.sum().item(), loss.item(), norm and float(norm), self.scheduler.get_last_lr(), scale))
        return seen


def draws() -> tuple[float, ...]:
    """What each generator would give next."""
    from tp_plugin.tensor import rng

    before = rng.snapshot()
    found = torch.rand(1).item(), random.random(), float(np.random.rand())
    rng.restore(before)
    return found


def resumed(tp: int, root: str) -> tuple[Any, Any]:
    """Train, save in the middle of an epoch, train on; then a new script that loads and trains on."""
    from accelerate import skip_first_batches

    with accelerated(tp):
        script = Script(root, seed=0, scaled=True)
        batches = iter(script.loader)
        script.train(batches, 2)
        script.accelerator.save_state(f"{root}/state")
        on = draws(), script.train(batches, 6)
        batches.close()
        weights = {k: v.clone() for k, v in script.accelerator.get_state_dict(script.model).items()}
        del script
    with accelerated(tp):
        script = Script(root, seed=3, scaled=True)
        script.accelerator.load_state(f"{root}/state")
        again = draws(), script.train(iter(skip_first_batches(script.loader, 2)), 6)
        found = script.accelerator.get_state_dict(script.model)
        assert on == again, (on, again)
        assert all(torch.equal(weights[name], tensor) for name, tensor in found.items())
    return on, again


@pytest.mark.parametrize("tp, dp", [(2, 2), pytest.param(2, 1, marks=pytest.mark.full)])
def test_resumed_to_the_last_bit(tp: int, dp: int, tmp_path: Path) -> None:
    """Weights, generators, loader position, scheduler, scaler and the step of gradient accumulation."""
    found = run(tp * dp, resumed, tp, str(tmp_path))
    assert len({scale for *_, scale in found[0][1][1]}) > 1, "the scale never grew"
    assert found[0][0] != found[-1][0] or dp == 1, "the replicas had the same batches"
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "tp_plugin_state.json"} <= names
    assert {name for name in names if name.startswith("random")} == {f"random_states_{i}.pkl" for i in range(dp)}
    assert ".unfinished" not in names


def resumed_by_the_loader(tp: int, root: str) -> tuple[Any, ...]:
    """The same with a StatefulDataLoader, which goes on by itself; a peer's is as far as its leader's."""
    with accelerated(tp):
        script = Script(root, seed=0, stateful=True)
        batches = iter(script.loader)
        script.train(batches, 2)
        position = copy.deepcopy(script.loader.state_dict())  # each rank writes it, to one and the same file
        script.accelerator.save_state(f"{root}/state")
        on = [*script.train(batches, 6), *script.train(iter(script.loader), 2)]
    with accelerated(tp):
        script = Script(root, seed=3, stateful=True)
        script.accelerator.load_state(f"{root}/state")
        again = [*script.train(iter(script.loader), 6), *script.train(iter(script.loader), 2)]
    return on, again, position


def test_a_stateful_loader_goes_on(tmp_path: Path) -> None:
    found = run(4, resumed_by_the_loader, 2, str(tmp_path))
    for on, again, position in found:
        assert on == again
        assert position == found[0][2] and position["_num_yielded"] == 2


def in_one_run(tp: int, root: str) -> dict[str, Any]:
    """Several things that may happen to a state, in one run; what this rank saw of them."""
    from accelerate.utils import other

    from tp_plugin.checkpoint import atomic_dir

    seen: dict[str, Any] = {}
    with accelerated(tp):
        script = Script(root, seed=0, automatic=True, limit=2)
        accelerator = script.accelerator
        accelerator.project_configuration.automatic_checkpoint_naming = False
        if accelerator.is_main_process:  # as diffusers' scripts do; the other ranks go on
            accelerator.save_state(f"{root}/main_only")
        accelerator.wait_for_everyone()
        script.train(iter(script.loader), 2)
        accelerator.load_state(f"{root}/main_only")

        real = other.safe_save_file

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        other.safe_save_file = full
        try:
            accelerator.save_state(f"{root}/main_only")
        except Exception as error:
            seen["full disk"] = f"{type(error).__name__}: {error}"
        other.safe_save_file = real
        accelerator.load_state(f"{root}/main_only")

        accelerator.project_configuration.iteration = 0  # which the main process has counted alone
        accelerator.project_configuration.automatic_checkpoint_naming = True
        for _ in range(3):
            accelerator.save_state()
        accelerator.wait_for_everyone()
        seen["kept"] = sorted(path.name for path in Path(root, "checkpoints").iterdir())
        newest = Path(root, "checkpoints", "checkpoint_2")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (newest / "optimizer.bin").unlink()
        accelerator.wait_for_everyone()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            accelerator.load_state()
        seen["told"] = [str(warning.message) for warning in told if "not complete" in str(warning.message)]
        for case in ("missing", "interrupted", "engine"):
            accelerator.wait_for_everyone()
            if accelerator.is_main_process and case == "interrupted":
                for path in newest.iterdir():
                    path.unlink()
                (newest / atomic_dir.ASIDE).mkdir()
            if accelerator.is_main_process and case == "engine":
                atomic_dir.describe(Path(root, "main_only"), {"engine": "FSDP2"})
            accelerator.wait_for_everyone()
            try:
                accelerator.load_state(f"{root}/main_only" if case == "engine" else str(newest))
            except Exception as error:
                seen[case] = f"{type(error).__name__}: {error}"
    return seen


def test_faults(tmp_path: Path) -> None:
    for rank, seen in enumerate(run(2, in_one_run, 2, str(tmp_path))):
        kind = "OSError: [Errno 28]" if rank == 0 else "TPError: save_state failed on rank 0: [Errno 28]"
        assert seen["full disk"] == f"{kind} No space left on device"
        assert seen["kept"] == ["checkpoint_1", "checkpoint_2"]
        assert len(seen["told"]) == 1 and "checkpoint_1 is loaded" in seen["told"][0]
        assert "checkpoint_2 is not complete: optimizer.bin is missing" in seen["missing"]
        assert "ended in the middle" in seen["interrupted"]
        assert "was saved by FSDP2, this run uses DDP" in seen["engine"] and "tp-plugin export" in seen["engine"]


def saved(tp: int, root: str) -> Any:
    with accelerated(tp):
        script = Script(root, seed=0)
        script.accelerator.save_state(f"{root}/state")
        return dict(script.accelerator.get_state_dict(script.model))


def loaded(tp: int, root: str) -> Any:
    with accelerated(tp):
        script = Script(root, seed=5)
        script.accelerator.load_state(f"{root}/state")
        return dict(script.accelerator.get_state_dict(script.model)), script.accelerator.step


def test_exported_and_resharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tp_plugin.cli.main import main

    weights = run(4, saved, 2, str(tmp_path))[0]
    for found, _ in run(2, loaded, 2, str(tmp_path)):  # a dp of 1 has no DDP, whose names begin with `module.`
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert main(["export", str(tmp_path / "state"), str(tmp_path / "out"), "--max-shard-size", "0.00005"]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in weights.items())
    assert main(["reshard", str(tmp_path / "state"), str(tmp_path / "other"), "--tp", "4"]) == 0
    copied, original = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "state"))
    assert copied.keys() == original.keys() and len(copied) == len(weights)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "no")]) == 1
    assert "model.safetensors has 0 bytes" in capsys.readouterr().err
