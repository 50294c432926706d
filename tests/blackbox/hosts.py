"""Two machines on one: network namespaces joined by a virtual cable. Their processes share nothing but the files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness
from .harness import TIMED_OUT, Layout, Run

PREFIX = "tp-plugin"
CABLE = "net0"
NETWORK = "10.203.7"


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces with the addresses NETWORK.1 and NETWORK.2, which are gone afterwards."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` to make two network namespaces: apt-get install iproute2")
    _remove_stale()
    names = [f"{PREFIX}-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        try:
            ip("netns", "add", names[0])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine grants no right to make network namespaces: {error.stderr.strip()}")
        ip("netns", "add", names[1])
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            _remove(name)


def _remove(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _remove_stale() -> None:
    """What a session left that was killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(f"{PREFIX}-")):
        if not Path(f"/proc/{name.split('-')[-2]}").exists():
            _remove(name)


def launch(commands: list[list[str]], env: dict[str, str], out: Path, layout: Layout, timeout: float = 200) -> Run:
    """Run one command on each host until all have ended; the code is that of the first."""
    token = uuid.uuid4().hex
    started, code = time.monotonic(), TIMED_OUT
    environment = env | {"BLACKBOX_RUN": token, "GLOO_SOCKET_IFNAME": CABLE}
    with two_hosts() as hosts, contextlib.ExitStack() as stack:
        sinks = [stack.enter_context((out / f"host{number}.log").open("wb")) for number in (1, 2)]
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command], env=environment, cwd=out, stdout=sink,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )
            for host, command, sink in zip(hosts, commands, sinks, strict=True)
        ]  # fmt: skip
        try:
            codes = [process.wait(max(1, started + timeout - time.monotonic())) for process in processes]
            code = next((code for code in codes if code), 0)
        except subprocess.TimeoutExpired:
            pass
        finally:
            harness.stop(token, code == TIMED_OUT)
            for process in processes:
                process.wait()
    logs = "\n".join((out / f"host{number}.log").read_text(errors="replace") for number in (1, 2))
    return Run(out, layout, code, logs, time.monotonic() - started)
