"""Whatever befalls one rank: no rank hangs, those that are left say which rank it was and why, and nothing is lost.

Each test runs a small Accelerate script in fresh processes, some of which do not survive it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Ended, scripts
from models import batch, build, config_for
from transformers import AutoModelForCausalLM

IN_PIECES = {"max_shard_size": "60KB"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    build(config_for("llama"), 0).save_pretrained(folder, **IN_PIECES)
    return folder


def rank() -> int:
    return int(os.environ["RANK"])


def begin(folder: str, patience: int = 120) -> tuple[Any, Any, Any]:
    """An accelerator, and the prepared model and optimizer; torch grants each collective ``patience`` seconds."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=patience), backend="gloo")
    accelerator = Accelerator(cpu=True, kwargs_handlers=[timeout])
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def step(accelerator: Any, model: Any, optimizer: Any, seed: int = 0) -> float:
    loss = model(**batch(97, seed)).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def told(ended: list[Ended], dead: dict[int, int], *words: str) -> None:
    """The ranks of ``dead`` ended with their codes, the others by an error, and they said all of ``words``."""
    for at, end in enumerate(ended):
        assert end.code is not None, f"rank {at} hung:\n{end.said[-3000:]}"
        assert end.code == dead.get(at, 1), f"rank {at} ended with {end.code}:\n{end.said[-3000:]}"
        for word in words if at not in dead else ():
            assert word in end.said, f"rank {at} does not say {word!r}:\n{end.said[-3000:]}"


def weights(folder: Any) -> torch.Tensor:
    """All weights of a checkpoint that plain transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


# --- a rank that is not there any more ------------------------------------------------------------------------------


def killed_in_a_step(folder: str) -> None:
    everything = begin(folder)
    step(*everything)
    if rank() == 1:
        everything[1].register_forward_hook(die)
    step(*everything)


def test_killed_in_a_step(model_folder: str, tmp_path: Path) -> None:
    """Ranks of another replica hear of it too, though DDP itself names nobody."""
    told(scripts(4, killed_in_a_step, model_folder, folder=tmp_path), {1: -9}, "rank 1 is gone without a word: killed")


def killed_in_loading(folder: str) -> None:
    from tp_plugin.shard import lazy_load

    if rank() == 1:
        lazy_load.read_shard = die
    begin(folder)
    if rank() == 0:
        torch.distributed.barrier()  # what a script does when its model is there


def raising(folder: str) -> None:
    everything = begin(folder)
    step(*everything)
    if rank() == 1:
        raise ValueError("no such column: 'text'")
    step(*everything)


def test_raising_while_others_wait(model_folder: str, tmp_path: Path) -> None:
    ended = scripts(4, raising, model_folder, folder=tmp_path)
    told(ended, {}, "ValueError: no such column: 'text'")
    told(ended, {1: 1}, "rank 1 died of ValueError: no such column: 'text' at", "test_faults.py:")


# --- a rank that is elsewhere ---------------------------------------------------------------------------------------


def lone_collective(folder: str) -> None:
    everything = begin(folder, patience=15)
    step(*everything)
    if rank() == 0:
        torch.distributed.all_reduce(torch.zeros(1))
    step(*everything)


def test_a_collective_on_one_rank_only(model_folder: str, tmp_path: Path) -> None:
    ended = scripts(2, lone_collective, model_folder, folder=tmp_path, TP_PLUGIN_NOTICE_AFTER="2")
    told(ended, {})
    # while it lasts, and as it ends by torch's own timeout: the line at which the other rank is
    (notice,) = [line for line in ended[1].said.splitlines() if "tp_plugin: rank 1 has waited" in line]
    assert "rank 0 is at" in notice and "in lone_collective, busy" in notice
    assert "rank 1 lost other ranks in all_gather of the unit_cpu group [0, 1]" in ended[1].said


def skipped_backward(folder: str) -> None:
    accelerator, model, optimizer = begin(folder)
    step(accelerator, model, optimizer)
    loss = model(**batch(97, 1)).loss
    if not accelerator.is_main_process:
        accelerator.backward(loss)
    model(**batch(97, 2))


def test_a_mutual_wait_ends(model_folder: str, tmp_path: Path) -> None:
    """One rank is in a backward's all-reduce, the other at the next forward: torch would wait for two minutes here."""
    started = time.monotonic()
    ended = scripts(2, skipped_backward, model_folder, folder=tmp_path, TP_PLUGIN_ABORT_AFTER="3")
    told(ended, {}, "the ranks of a TP group wait for each other, and would for good: rank 0 at ")
    assert time.monotonic() - started < 100
    for end in ended:
        assert "all_gather of the unit_cpu group [0, 1]" in end.said and "all_reduce of the tp group [0, 1]" in end.said
    assert "LostRankError" in ended[0].said, "the main process raises"


def stopped(folder: str) -> None:
    from tp_plugin.runtime import transport

    transport.UNANSWERED = 2.0
    everything = begin(folder, patience=15)
    step(*everything)
    pid = Path(folder).parent / "stopped.pid"
    if rank() == 1:
        pid.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        step(*everything)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.full
def test_a_stopped_process(model_folder: str, tmp_path: Path) -> None:
    ended = scripts(2, stopped, model_folder, folder=tmp_path, TP_PLUGIN_NOTICE_AFTER="2")
    told(ended, {1: -9}, "rank 1 does not answer: its process is stopped")
    assert "rank 0 lost other ranks in all_" in ended[0].said


# --- saving ---------------------------------------------------------------------------------------------------------


def killed_in_saving(folder: str, output: str, who: int) -> None:
    from tp_plugin.engines import saving

    everything = begin(folder)
    model = everything[1]
    model.save_pretrained(output, **IN_PIECES)
    step(*everything)
    gathering = model.tp_record.runtime.mesh.unit_cpu
    calls = []

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return die() if len(calls) == 20 - 17 * (who == 0) else original(*args, **kwargs)

        return call

    if rank() == who == 1:
        gathering.gather = dying(gathering.gather)
    elif rank() == who:
        saving.nameless = dying(saving.nameless)
    model.save_pretrained(output, **IN_PIECES)
    if who == 0:
        step(*everything)


@pytest.mark.parametrize("who", [0, 1])
def test_killed_in_saving(who: int, model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "saved"
    ended = scripts(2, killed_in_saving, model_folder, str(output), who, folder=tmp_path)
    told(ended, {who: -9}, f"rank {who} is gone without a word")
    assert len(list(output.glob("*.safetensors"))) > 3
    assert torch.equal(weights(output), weights(model_folder)), "the checkpoint that was there is there no more"


def full_disk(folder: str, output: str) -> None:
    everything = begin(folder)
    model = everything[1]
    model.save_pretrained(output, **IN_PIECES)
    if rank() == 0:
        with open(f"{output}/ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        os.truncate(f"{output}/ballast", os.path.getsize(f"{output}/ballast") - 100_000)
    step(*everything)
    try:
        model.save_pretrained(output, **IN_PIECES)
    except Exception as error:
        print(f"TOLD {type(error).__name__} {error} BECAUSE {error.__cause__}", flush=True)
    step(*everything)


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[None]:
    at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine grants no right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


def test_a_full_disk(model_folder: str, tmp_path: Path) -> None:
    """All ranks of the group get the error, so a script may catch it and train on; what was saved before is there."""
    with small_disk(tmp_path / "disk", "2M"):
        ended = scripts(2, full_disk, model_folder, str(tmp_path / "disk"), folder=tmp_path)
        told(ended, {0: 0, 1: 0})
        for end in ended:
            lines = [line for line in end.said.splitlines() if line.startswith("TOLD")]
            assert len(lines) == 1, end.said
            assert "space" in lines[0] or "os error 28" in lines[0], lines[0]
        assert "rank 0 failed in" in ended[1].said
        assert torch.equal(weights(tmp_path / "disk"), weights(model_folder))
        assert not list((tmp_path / "disk").rglob("*.unfinished"))


# --- loading --------------------------------------------------------------------------------------------------------


def broken_shards(folders: dict[str, str]) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True)
    for name, folder in folders.items():
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:
            print(f"TOLD {name}: {' '.join(f'{type(error).__name__} {error}'.split())}", flush=True)


def test_killed_in_loading_and_broken_shards(model_folder: str, tmp_path: Path) -> None:
    told(scripts(2, killed_in_loading, model_folder, folder=tmp_path), {1: -9}, "rank 1 is gone without a word: killed")

    broken = {name: tmp_path / name for name in ("short", "empty", "missing", "garbage", "foreign")}
    for folder in broken.values():
        shutil.copytree(model_folder, folder)
    shards = {name: sorted(folder.glob("*.safetensors"))[1] for name, folder in broken.items()}
    os.truncate(shards["short"], shards["short"].stat().st_size - 10)
    os.truncate(shards["empty"], 0)
    shards["missing"].unlink()
    shards["garbage"].write_bytes((20).to_bytes(8, "little") + b"x" * 5000)
    other = tmp_path / "other"
    build(config_for("llama", hidden_size=24), 0).save_pretrained(other, **IN_PIECES)
    for shard in broken["foreign"].glob("*"):  # the weights of another model under this one's config
        if "safetensors" in shard.name:
            shard.unlink()
    for shard in other.glob("*safetensors*"):
        shutil.copy(shard, broken["foreign"])
    ended = scripts(2, broken_shards, {name: str(folder) for name, folder in broken.items()}, folder=tmp_path)
    told(ended, {0: 0, 1: 0})
    for end in ended:
        said = {line.split()[1]: line for line in end.said.splitlines() if line.startswith("TOLD")}
        assert set(said) == {f"{name}:" for name in broken}, end.said
        for name in ("short", "empty", "missing", "garbage"):
            assert shards[name].name in said[f"{name}:"], said[f"{name}:"]
        assert "size" in said["foreign:"].lower(), said["foreign:"]


# --- Trainer's checkpoints ------------------------------------------------------------------------------------------


def trained(folder: str, output: str, dies: bool, resumes: bool) -> None:
    from transformers import Trainer, TrainingArguments

    class Dies(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            if dies and self.state.global_step == 4 and rank() == 0:
                die()

    arguments = TrainingArguments(
        output_dir=output, max_steps=6, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-2, seed=3,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in batch(97, 0, size=16)["input_ids"]]
    one = Dies(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=rows)
    one.train(resume_from_checkpoint=resumes)
    print("LOSSES", [entry["loss"] for entry in one.state.log_history if "loss" in entry], flush=True)


def test_killed_in_a_checkpoint_of_trainer(model_folder: str, tmp_path: Path) -> None:
    """The newest folder has weights, optimizer and scheduler, and is not taken for a checkpoint."""
    through, cut = str(tmp_path / "through"), str(tmp_path / "cut")
    whole = scripts(2, trained, model_folder, through, False, False, folder=tmp_path)
    killed = scripts(2, trained, model_folder, cut, True, False, folder=tmp_path)
    told(killed, {0: -9}, "rank 0 is gone without a word")
    assert {path.name for path in Path(cut).iterdir()} == {"checkpoint-2", "checkpoint-4"}
    again = scripts(2, trained, model_folder, cut, False, True, folder=tmp_path)
    told(again, {0: 0, 1: 0})
    for end, other in zip(again, whole, strict=True):
        assert "checkpoint-4 is not complete" in end.said and "checkpoint-2 is taken" in end.said
        found, expected = ([line for line in e.said.splitlines() if line.startswith("LOSSES")] for e in (end, other))
        assert found == expected and len(expected) == 1
    assert torch.equal(weights(f"{cut}/checkpoint-6"), weights(f"{through}/checkpoint-6"))


# --- SIGTERM --------------------------------------------------------------------------------------------------------


def preempted(folder: str, output: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class SlowSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and rank() == 1:  # the signal finds one rank, in the middle of its step
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    arguments = TrainingArguments(
        output_dir=output, max_steps=200, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, enable_jit_checkpoint=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 97, (16, 8))]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=rows, callbacks=[SlowSteps()]
    )
    trainer.train()
    print(f"STOPPED {trainer.state.global_step}", flush=True)


def test_sigterm_on_one_rank_of_a_trainer(model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "trainer"
    ended = scripts(2, preempted, model_folder, str(output), folder=tmp_path)
    told(ended, {0: 0, 1: 0})
    steps = {line.split()[1] for end in ended for line in end.said.splitlines() if line.startswith("STOPPED")}
    (stopped_at,) = steps
    assert 2 < int(stopped_at) < 200
    (checkpoint,) = output.iterdir()
    assert not (checkpoint / "checkpoint-is-incomplete.txt").exists()
    saved_at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert checkpoint.name == f"checkpoint-{saved_at}" and saved_at in (int(stopped_at), int(stopped_at) - 1)
    weights(checkpoint)
