"""A `python` whose processes start in a tenth of a second: forks of interpreters that have their imports behind them.

Importing torch, Accelerate and transformers takes a rank five seconds of CPU, more than most scripts of the tests run.
``python()`` is the path of an executable that takes `script arguments` or `-m module arguments` as Python does, but
has a server (server.py) fork a process for them; environment, working directory, streams, session, signals and
exit code are those of the caller, and the interpreter ends as any does. A launcher that is started so starts its ranks
so, too. tests/blackbox/test_preloaded.py compares such launches with real ones.

What the plugin sees is the same as well: the servers of ranks are started with ``TP_PLUGIN_TP_SIZE``, as the ranks of
a launch are, so that libraries are patched in the course of their import. There are two, since strings have other
hashes in each interpreter: ranks that iterate over a set must not agree by chance. Launchers, plain runs, and scripts
in whose own code the key stands, are forks of a server that has not looked for the plugin; torch's autoload runs after
the fork.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PLAIN = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
TENSOR_PARALLEL = {"TP_PLUGIN_TP_SIZE": "2"}  # the size itself is read later
SERVERS = {"plain": PLAIN, "even": TENSOR_PARALLEL, "odd": TENSOR_PARALLEL}
"""What each server has in its environment."""

READ_AT_IMPORT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1",
}  # fmt: skip
"""What every rank of the tests has, and libraries read while they are imported."""

MODULES = [
    "torch.distributed.run", "torch.utils.data", "accelerate", "datasets", "peft", "transformers.trainer",
    "transformers.generation.utils", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
]  # fmt: skip
"""Not DeepSpeed, TRL, or Accelerate's commands: they take little time, and what has not imported them behaves so."""


def available() -> bool:
    """Not where a library may have started a driver before the fork, nor where somebody wants real processes only."""
    return not os.environ.get("TEST_REAL_PROCESSES") and not Path("/dev/nvidiactl").exists()


@functools.cache
def python() -> str:
    """Start the servers, once; the path of the executable."""
    folder = Path(tempfile.mkdtemp(prefix="tp-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    executable = folder / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{HERE / "client.py"}" "{folder}" "$@"\n')
    executable.chmod(0o755)
    theirs = ("ACCELERATE_", "TP_PLUGIN_", "PARALLELISM_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    common = {key: value for key, value in os.environ.items() if not key.startswith(theirs)} | READ_AT_IMPORT
    for name, own in SERVERS.items():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / name))
        listener.listen(64)
        command = [sys.executable, str(HERE / "server.py"), str(listener.fileno()), str(executable), *MODULES]
        with listener, (folder / f"{name}.log").open("wb") as log:
            server = subprocess.Popen(
                command, env=common | own, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()]
            )
        atexit.register(server.kill)  # ends anyway when its input does
    return str(executable)
