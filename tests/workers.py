"""Groups of gloo ranks, spawned once per test session and reused over all cases.

``run(world, function, *args)`` calls a module-level function in every rank and returns the ranks' results. A rank that
raises fails the test with its traceback; a rank that hangs fails it by the groups' timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import importlib
import os
import queue
import random
import signal
import socket
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

TIMEOUT = int(os.environ.get("TEST_TIMEOUT", "40"))
"""Seconds for one collective, and for one case."""
IMPORTS = 240
"""Seconds in which ranks start and import a module of tests; what they take depends on the machine, not on the case."""

_pools: dict[int, Pool] = {}


class WorkerError(RuntimeError):
    """What one or more ranks raised, with their tracebacks."""


class Pool:
    def __init__(self, world: int):
        self.world = world
        context = mp.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(target=_work, args=(rank, world, port, self.tasks[rank], self.results), daemon=True)
            for rank in range(world)
        ]
        with unittest.mock.patch.dict(os.environ):
            for name in [name for name in os.environ if name.startswith("TP_PLUGIN_")]:
                del os.environ[name]  # what a test of a command has set is not for the ranks, which would be patched
            for process in self.processes:
                process.start()
        self.imported: set[str] = set()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if function.__module__ not in self.imported:
            self._ask(IMPORTS, __name__, _import.__name__, (function.__module__,))
            self.imported.add(function.__module__)
        return self._ask(TIMEOUT + 30, function.__module__, function.__qualname__, args)

    def _ask(self, patience: float, module: str, name: str, args: tuple[Any, ...]) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((module, name, args))
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            while len(answers) < self.world:
                rank, ok, value = self.results.get(timeout=patience)
                answers[rank] = (ok, value)
        except queue.Empty:
            missing = sorted(set(range(self.world)) - set(answers))
            for rank in missing:
                os.kill(self.processes[rank].pid, signal.SIGUSR1)  # prints where it is, on stderr
            time.sleep(2)
            self.stop()
            raise WorkerError(
                f"ranks {missing} of {self.world} gave no answer in {patience} s; their stacks are on stderr. "
                f"The others: {answers}"
            ) from None
        failed = {rank: value for rank, (ok, value) in answers.items() if not ok}
        if failed:
            if len(failed) < self.world:
                self.stop()  # collectives may be out of step: the next case starts a fresh group
            raise WorkerError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failed.items())))
        return [answers[rank][1] for rank in range(self.world)]

    def stop(self) -> None:
        _pools.pop(self.world, None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of ``function(*args)`` on each of ``world`` ranks, in rank order."""
    if world not in _pools:
        _pools[world] = Pool(world)
    return _pools[world].run(function, *args)


def sees_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a case that is a script: parameters, and what hooks get, look whole to it. All others look at shards."""
    function.sees_whole = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def _shards_or_whole(case: Callable[..., Any]) -> Iterator[None]:
    from tp_plugin.shard.module_hooks import ModuleHooks
    from tp_plugin.tensor.global_view import ScriptRegion

    if getattr(case, "sees_whole", False):
        yield
        return
    patch = unittest.mock.patch.object
    with (
        patch(ScriptRegion, "add", lambda self, parameter, info: None),
        patch(ModuleHooks, "adopt", lambda self, module, number=None: None),
    ):
        yield


@atexit.register
def stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()


@contextlib.contextmanager
def _own_patches() -> Iterator[None]:
    """What a case patches, or has patched once a library is imported, is the next one's no more."""
    from tp_plugin.engines.patching import taken_back
    from tp_plugin.launch import imports, worker

    awaited = {name: list(actions) for name, actions in imports._finder.awaited.items()}
    registered = set(worker._registered)
    try:
        with taken_back():
            yield
    finally:
        imports._finder.awaited = awaited
        worker._registered.clear()
        worker._registered.update(registered)


def _import(module: str) -> None:
    importlib.import_module(module)


def _seed() -> None:
    """The same generators on all ranks, whatever ran before: else the first step of a run brings them together."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _work(rank: int, world: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    os.environ.pop("TP_PLUGIN_DISABLE", None)  # a command that is tested in pytest's process sets it for itself
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    sys.path.insert(0, os.path.dirname(__file__))
    timeout = datetime.timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    parent = os.getppid()
    while True:
        try:
            module, name, args = tasks.get(timeout=10)
        except queue.Empty:
            if os.getppid() != parent:
                return  # pytest was killed: leave nothing behind
            continue
        environment = dict(os.environ)
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            _seed()
            with _own_patches(), _shards_or_whole(target):
                results.put((rank, True, target(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:  # the options that a case sets are its own
            os.environ.clear()
            os.environ.update(environment)
            # DeepSpeed leaves one of its own, with which plain selective checkpoints are wrong (by 0.56)
            torch.nn.functional.linear = torch._C._nn.linear
