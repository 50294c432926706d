"""Ranks on this machine for the proof: starting them, and having one of them do something for all."""

from __future__ import annotations

import datetime
import io
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tp_plugin.config.keys import ENV_DISABLE
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh

TIMEOUT = 120
"""Seconds for one collective, and for the next rank's answer."""


def run_on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of ``function(*args)`` in ``world`` fresh processes that are one gloo world, in rank order.

    Args:
        function: of a module, so that it pickles; an error for the user it returns as a TPError.

    Raises:
        TPError: a rank returned one, raised or hung; the message has its traceback.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, results, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world:
            rank, answer, failure = results.get(timeout=TIMEOUT)
            if failure is not None:
                raise TPError(f"rank {rank} of {world} failed:\n{failure}")
            if isinstance(answer, TPError):
                raise answer
            answers[rank] = answer
    except queue.Empty:
        raise TPError(f"ranks {sorted(set(range(world)) - set(answers))} gave no answer in {TIMEOUT} s") from None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [answers[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.pop(ENV_DISABLE, None)  # which the command sets for itself: the ranks take the options
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
        results.put((rank, function(*args), None))
        torch.distributed.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def on_first_rank(mesh: Mesh, make: Callable[[], Any]) -> Any:
    """What ``make`` gives on the TP group's first rank, on every rank. Collective over the TP group.

    Args:
        make: gives tensors, numbers, strings and containers of them.

    Raises:
        TPError: ``make`` raised on the first rank; every rank raises.
    """
    packed = io.BytesIO()
    error: str | None = None
    if mesh.tp.rank == 0:
        try:
            torch.save(make(), packed)
        except TPError as known:
            error = str(known)
        except Exception:
            error = traceback.format_exc()
    error, data = mesh.unit_cpu.broadcast_object((error, packed.getvalue()))
    if error is not None:
        raise TPError(error)
    return torch.load(io.BytesIO(data), weights_only=True)
