"""Processes that tests/preloaded forks are what a real launch starts: the same to a script, and at their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest

from .zero import accelerate, write_config

pytestmark = pytest.mark.skipif(not preloaded.available(), reason="nothing is forked here")

VARYING = ("BLACKBOX_RUN", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
BY_SHELL = ("_", "PWD", "OLDPWD", "SHLVL")  # the stand-in for `python` is a shell script that starts Python
WAYS = {"plain": (1, 1), "yaml": (2, 1), "zero accelerate": (2, 1), "fsdp2": (2, 1)}


@pytest.mark.parametrize("entry", WAYS)
def test_a_rank_sees_what_it_sees_in_a_real_launch(bench, tmp_path, entry):
    config = {}
    if entry == "zero accelerate":
        config = {"deepspeed_config": {"deepspeed_config_file": write_config(tmp_path / "ds.json", accelerate(2), 2)}}
    forked, real = (bench.run("process", *WAYS[entry], entry=entry, config=config, real=how) for how in (False, True))
    assert forked is not real
    for own, expected in zip(forked.ranks, real.ranks, strict=True):
        for run, rank in ((forked, own), (real, expected)):
            for name in (*VARYING, *BY_SHELL):
                rank["seen"]["environment"].pop(name, None)
            rank["seen"] = without(rank["seen"], str(run.out))
        assert own["seen"] == expected["seen"]
    drawn = [tuple(rank["own"].values()) for rank in (*forked.ranks, *real.ranks)]
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == len(values), f"processes that draw the same, or hash the same: {values}"


def without(seen, folder: str):
    """With another word for the run's folder."""
    if isinstance(seen, dict):
        return {key: without(value, folder) for key, value in seen.items()}
    if isinstance(seen, list):
        return [without(value, folder) for value in seen]
    return seen.replace(folder, "OUT") if isinstance(seen, str) else seen


def start(tmp_path: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(code)
    command = [preloaded.python(), str(tmp_path / "script.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    "code, expected, said",
    [
        ("print('done')", 0, "done\nat exit\n"),
        ("sys.exit(7)", 7, "at exit\n"),
        ("sys.exit('a word')", 1, "a word\nat exit\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("threading.Thread(target=lambda: (time.sleep(0.2), print('a thread'))).start()", 0, "a thread\nat exit\n"),
        ("sys.excepthook = lambda *found: print(*found[:2])\n1 / 0", 1, "division by zero\nat exit\n"),
    ],
)
def test_it_ends_as_any_process(tmp_path, code, expected, said):
    head = "import atexit, os, signal, sys, threading, time\natexit.register(print, 'at exit')\n"
    process = start(tmp_path, head + code)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == expected
    assert output.endswith(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGABRT, signal.SIGKILL])
def test_signals_reach_it(tmp_path, number):
    process = start(tmp_path, "import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it outlived its stand-in"
        time.sleep(0.05)


def test_a_module_runs_too(tmp_path):
    (tmp_path / "words.py").write_text("import sys\nprint(__name__, sys.argv)")
    command = [preloaded.python(), "-m", "words", "a"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout == f"__main__ ['{tmp_path}/words.py', 'a']\n", result.stderr


def test_launchers_know_the_plugin_as_ever(tmp_path):
    """In the forked launcher, and in the ranks from the first import on."""
    code = "import accelerate.data_loader as d, sys\nprint(d.broadcast_object_list.__wrapped__, sys.executable)"
    (tmp_path / "script.py").write_text(code)
    command = [preloaded.python(), str(tmp_path / "script.py")]
    result = subprocess.run(
        command, env=os.environ | {"TP_PLUGIN_TP_SIZE": "2"}, capture_output=True, text=True, timeout=60
    )
    assert sys.executable in result.stdout, result.stderr
