"""A failed run says last, and once, which rank failed first, where and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tp_plugin.engines.patching import taken_back
from tp_plugin.launch.failures import install_in_launcher, summary

SCRIPT = """\
import os, sys, time
from accelerate import Accelerator
accelerator = Accelerator()
what, rank = sys.argv[1], int(os.environ["RANK"])
if what == "refusal":
    from tp_plugin.errors import TPError
    raise TPError("write it in one place")
if what == "raises" and rank == 1:
    raise ValueError("no such column")
open(f"{sys.argv[2]}/{rank}", "w").close()
if what == "raises":
    import torch
    torch.distributed.barrier()
time.sleep(100)
"""


def command(way: str, tmp_path: Path, what: str) -> list[str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    if way == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        words = ["--cpu", "--num_processes", "2", "--main_process_port", "0", "--tp_size", "2", "--num_machines", "1"]
        launcher = ["-m", "accelerate.commands.launch", *words, "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, *launcher, str(script), what, str(tmp_path)]


def environment(way: str, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "ACCELERATE"))}
    own = {"TP_PLUGIN_TP_SIZE": "2", "ACCELERATE_USE_CPU": "true"} if way == "torchrun" else {}
    return {**kept, "OMP_NUM_THREADS": "1", **own, **more}


def said(way: str, tmp_path: Path, what: str, **more: str) -> str:
    ended = subprocess.run(
        command(way, tmp_path, what), env=environment(way, **more), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("way", ["accelerate launch", "torchrun"])
def test_one_traceback_and_the_cause_last(way: str, tmp_path: Path) -> None:
    lines = said(way, tmp_path, "raises").rstrip().splitlines()
    assert lines[-2] == f"tp_plugin: rank 1 failed at {tmp_path}/train.py:9: ValueError: no such column"
    assert lines[-1].startswith("(exit codes: rank 0: ") and "TP_PLUGIN_VERBOSE=1" in lines[-1]
    assert sum(line.startswith("Traceback") for line in lines) == 1


def test_a_refusal_is_said_once(tmp_path: Path) -> None:
    text = said("accelerate launch", tmp_path, "refusal")
    assert text.count("write it in one place") == 1 and "Traceback" not in text


def test_a_launcher_is_patched_once() -> None:
    """``accelerate launch`` finds the key in its own config, and in a DeepSpeed config that it hands to the script."""

    class Launch:
        def __call__(self) -> None: ...

    api = SimpleNamespace(elastic_launch=Launch)
    with taken_back():
        install_in_launcher(api)
        once = Launch.__call__
        install_in_launcher(api)
        assert Launch.__call__ is once and once.tp_patched  # type: ignore[attr-defined]


def test_verbose_is_every_rank(tmp_path: Path) -> None:
    text = said("accelerate launch", tmp_path, "refusal", TP_PLUGIN_VERBOSE="1")
    assert text.count("tp_plugin.errors.TPError: write it in one place") == 2


def test_an_interrupt_is_quiet(tmp_path: Path) -> None:
    launched = subprocess.Popen(
        command("accelerate launch", tmp_path, "waits"),
        env=environment(""), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not all((tmp_path / name).exists() for name in "01") and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(launched.pid, signal.SIGINT)  # as a terminal does
    text = launched.communicate(timeout=60)[1]
    assert launched.returncode != 0
    assert "Traceback" not in text, text
    assert text.rstrip().endswith("tp_plugin: ended by signal 2."), text


def failure(exitcode: int, told: dict[str, Any] | None = None, timestamp: int = 5) -> Any:
    names = {9: "SIGKILL", 15: "SIGTERM"}
    message = "To enable traceback see: ..." if told is None else {"message": "Boom: x", "extraInfo": told}
    return SimpleNamespace(
        exitcode=exitcode, message=message, timestamp=timestamp, signal_name=lambda: names[-exitcode]
    )


def test_who_was_first() -> None:
    own = {"line": "a.py:1", "py_callstack": "", "lost_others": False}
    lost = {**own, "line": "a.py:2", "lost_others": True}
    found = {0: failure(1, lost, 3), 1: failure(-15), 2: failure(1, own, 4)}
    assert summary(found).startswith("tp_plugin: rank 2 failed at a.py:1: Boom: x\n")
    assert summary({0: failure(-15), 1: failure(-9)}).startswith("tp_plugin: rank 1 was killed by SIGKILL")
    assert summary({0: failure(3)}) == "tp_plugin: rank 0 ended with exit code 3\n(exit codes: rank 0: 3)"


def test_what_another_program_left_in_the_file_is_let_be(tmp_path: Path) -> None:
    other = failure(1)
    other.message = json.loads('{"message": "RuntimeError: x", "extraInfo": {"py_callstack": "", "timestamp": "1"}}')
    assert "ended with exit code 1" in summary({0: other})
