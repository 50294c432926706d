"""Groups of ranks that may die: fresh processes, forked from one that has imported everything (0.2 s, not 10).

``scripts(world, function, *args)`` runs a module-level function in every rank as `accelerate launch` does a script,
with the plugin on and ``tp_size`` 2, and tells how each rank ended.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PATIENCE = 280
"""Seconds after which a rank hangs. Every timeout that a fault may take is far below, also on a busy machine."""

PRELOADED = [
    "torch", "accelerate", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
    "transformers.trainer", "transformers.integrations.deepspeed", "models", "fresh",
]  # fmt: skip


@dataclass
class Ended:
    """How one rank ended: its exit code (-9: killed, None: it hung), and what it wrote."""

    code: int | None
    said: str


def scripts(world: int, function: Callable[..., Any], *args: Any, folder: Path, **environment: str) -> list[Ended]:
    """Run ``function(*args)`` in ``world`` ranks."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # the launcher has it
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = [
        context.Process(target=_script, args=(rank, world, store.port, str(logs[rank]), environment, function, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    started = time.monotonic()  # after the first start has waited for the imports
    ended: set[int] = set()
    while len(ended) < world and time.monotonic() < started + PATIENCE:
        for rank, process in enumerate(ranks):
            if rank not in ended and process.exitcode is not None:
                ended.add(rank)
        time.sleep(0.02)
    for rank, process in enumerate(ranks):
        if rank not in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    said = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    codes = [process.exitcode if rank in ended else None for rank, process in enumerate(ranks)]
    return [Ended(code, text) for code, text in zip(codes, said, strict=True)]


def _script(
    rank: int, world: int, port: int, log: str, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(sink, 1), os.dup2(sink, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
        TP_PLUGIN_TP_SIZE="2", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    os.environ.update(environment)
    from tp_plugin.launch import worker

    torch.set_num_threads(1)
    worker.register()
    try:
        function(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    else:
        code = 0
    # multiprocessing leaves out what an interpreter does at its end
    try:
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    os._exit(code)
