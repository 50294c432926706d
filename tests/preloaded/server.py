"""Import modules, then fork a process for each client (client.py) and run there what it was to run.

``python server.py LISTENER EXECUTABLE MODULE ...``: LISTENER is the descriptor of the socket that clients connect to,
EXECUTABLE the path that launchers take for Python. Ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial


class Server:
    """Forks, and tells each client how its process ended. A client that goes takes its process with it."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.events = selectors.DefaultSelector()
        self.events.register(listener, selectors.EVENT_READ, self._fork)
        self.events.register(0, selectors.EVENT_READ, self._stop)
        self.processes: dict[int, tuple[int, socket.socket]] = {}  # by their pidfd

    def serve(self) -> list[int]:
        """Returns in forks only: the descriptors that their client sent."""
        while True:
            for key, _ in self.events.select():
                handle: Callable[[], list[int] | None] = key.data
                received = handle() if key.fd in self.events.get_map() else None
                if received is not None:
                    return received

    def _fork(self) -> list[int] | None:
        connection, _ = self.listener.accept()
        _, received, _, _ = socket.recv_fds(connection, 1, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pyarrow's allocator has a thread, and survives forks
            pid = os.fork()
        if pid == 0:
            self.listener.close()
            self.events.close()
            connection.close()
            for pidfd, (_, other) in self.processes.items():
                os.close(pidfd)
                other.close()
            return received
        for descriptor in received:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self.processes[pidfd] = pid, connection
        self.events.register(connection, selectors.EVENT_READ, partial(self._forward, pid, connection))
        self.events.register(pidfd, selectors.EVENT_READ, partial(self._report, pidfd))
        return None

    def _forward(self, pid: int, connection: socket.socket) -> None:
        """A signal; or the client's end."""
        try:
            received = connection.recv(1)
        except ConnectionResetError:
            received = b""
        if not received:
            self.events.unregister(connection)
        self._kill(pid, received[0] if received else signal.SIGKILL)

    def _kill(self, pid: int, number: int) -> None:
        try:
            os.killpg(pid, number)  # its own children, too: torchrun signals a group
        except ProcessLookupError:
            os.kill(pid, number)  # it leads no group yet

    def _report(self, pidfd: int) -> None:
        pid, connection = self.processes.pop(pidfd)
        self.events.unregister(pidfd)
        os.close(pidfd)
        if connection.fileno() in self.events.get_map():
            self.events.unregister(connection)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it left behind
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(code.to_bytes(4, "big", signed=True))
        connection.close()

    def _stop(self) -> None:
        for pid, _ in self.processes.values():
            self._kill(pid, signal.SIGKILL)
        os._exit(0)


def adopt(received: list[int], executable: str) -> list[str]:
    """Become what the client is: its streams, environment, folder, a session like its own. Returns its arguments."""
    os.setsid()
    *streams, source = received
    with open(source) as stream:
        request = json.load(stream)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(write_through=True)  # as `python -u`
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["launches"]:
        sys.executable = executable
    return request["argv"]


def seed() -> None:
    """Random numbers of its own, as every process begins with. (Python's random has seen to it.)"""
    import numpy
    import torch

    numpy.random.seed()
    torch.default_generator.seed()


def look_for_plugins() -> None:
    """At the end of `import torch`, which the server was kept from doing."""
    import torch

    if not enabled and torch._is_device_backend_autoload_enabled():
        torch._import_device_backends()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(argv: list[str]) -> None:
    """As `python argv ...` does it."""
    sys.orig_argv = [sys.executable, *argv]
    sys.path[1:] = [*_python_path(), *(path for path in sys.path[1:] if path not in given)]
    if argv[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = ["-m", *argv[2:]]  # until the module is found, whose packages may import torch
        look_for_plugins()
        runpy._run_module_as_main(argv[1])
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))
        sys.argv = argv
        look_for_plugins()
        main = types.ModuleType("__main__")
        main.__file__, main.__builtins__ = argv[0], __builtins__
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", argv[0])
        sys.modules["__main__"] = main
        with open(argv[0], "rb") as source:
            code = compile(source.read(), argv[0], "exec")
        exec(code, vars(main))


if __name__ == "__main__":
    number, executable, *modules = sys.argv[1:]
    sys.argv, given = [""], _python_path()
    enabled = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collections need not touch, and so copy, what all share
    arguments = adopt(Server(socket.socket(fileno=int(number))).serve(), executable)
    seed()
    run(arguments)
