"""What this rank is said to wait in: a collective of the host, or the oldest that its device has yet to finish."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from test_parallel import expect, pair
from workers import run

from tp_plugin.errors import DivergenceError, LostRankError
from tp_plugin.mesh import host_copy, waiting
from tp_plugin.mesh.waiting import Waiting
from tp_plugin.runtime import hang_report, script_position
from tp_plugin.runtime.hang_report import HangReport
from tp_plugin.runtime.mutual_wait import MutualWait


class Event:
    """An event of a device that comes when the test says so."""

    made: ClassVar[list[Event]] = []

    def __init__(self, device: Any = None) -> None:
        self.recorded = self.come = False
        self.error: RuntimeError | None = None
        Event.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        if self.error is not None:
            raise self.error
        return self.come

    def synchronize(self) -> None:
        raise AssertionError("nobody waits for the device")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """A tensor that lies on one."""
    Event.made = []
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(host_copy, "is_on_host", lambda tensor: False)
    yield torch.ones(2)


def enqueue(waiting: Waiting, what: str, tensor: torch.Tensor | None) -> Event:
    with waiting.on(what, True, tensor):
        pass
    return Event.made[-1]


def test_the_oldest_that_the_device_has_not_finished(device: torch.Tensor) -> None:
    found = Waiting()
    found.script_line = lambda: "train.py:12"
    first, second = enqueue(found, "all_reduce 1", device), enqueue(found, "all_reduce 2", device)
    wait = found.now()
    assert wait is not None and wait.in_unit and wait.what == "all_reduce 1"
    assert str(wait) == "all_reduce 1, which its device was given at train.py:12"
    time.sleep(0.02)
    assert found.seconds() >= 0.02
    first.come = True
    wait = found.now()
    assert wait is not None and wait.what == "all_reduce 2"
    assert wait.seconds() < 0.02, "until now the device was busy with the one before"
    since = wait.since
    assert (again := found.now()) is not None and again.since == since, "a wait is told once, by its beginning"
    second.come = True
    assert found.now() is None and found.seconds() == 0.0
    assert not found._outstanding


def test_collectives_of_the_host_leave_nothing_behind(device: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = Waiting()
    with found.on("all_gather", True, device):
        assert (wait := found.now()) is not None and str(wait) == "all_gather"
    assert found.now() is None and not found._outstanding


def test_memory_is_bounded_and_keeps_the_oldest_and_the_newest(device: torch.Tensor) -> None:
    found = Waiting()
    events = [enqueue(found, str(number), device) for number in range(2 * waiting.OUTSTANDING)]
    assert len(found._outstanding) == waiting.OUTSTANDING
    assert (oldest := found.now()) is not None and oldest.what == "0"
    for event in events[:-1]:
        event.come = True
    assert (newest := found.now()) is not None and newest.what == str(2 * waiting.OUTSTANDING - 1)


def test_a_device_that_failed_is_not_waited_for(device: torch.Tensor) -> None:
    found = Waiting()
    enqueue(found, "all_reduce", device).error = RuntimeError("CUDA error: unspecified launch failure")
    assert found.now() is None, "the thread that watches must not die of it"


def test_a_backward_is_the_scripts_line_in_every_thread(device: torch.Tensor) -> None:
    found = Waiting()
    found.script_line = script_position.script_line
    found.called_at = "train.py:7 in main"
    thread = threading.Thread(target=enqueue, args=(found, "all_reduce", device))
    thread.start()
    thread.join()
    assert (wait := found.now()) is not None and wait.line == "train.py:7 in main"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.distributed.DistBackendError("NCCL error in: x.cpp:3, unhandled cuda error (run with NCCL_DEBUG=INFO)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_an_error_of_this_device_keeps_its_kind_and_text(error: RuntimeError) -> None:
    found = Waiting()
    found.explain = lambda what, error: "rank 1 is gone"
    text = str(error)
    with pytest.raises(type(error)) as raised, found.on("all_reduce of the tp group [0, 1]"):
        raise error
    assert raised.value is error and not isinstance(raised.value, LostRankError)
    assert str(raised.value).startswith(text)
    assert "in all_reduce of the tp group [0, 1]. It is this rank's own device that failed" in str(raised.value)
    assert len(raised.value.args) == 1, "accelerate's find_executable_batch_size looks at the only argument"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer [127.0.0.1]:1234"),
        torch.distributed.DistBackendError("NCCL error: ncclRemoteError: a remote process exiting prematurely"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    ],
)
def test_other_errors_are_of_lost_ranks(error: RuntimeError) -> None:
    found = Waiting()
    found.explain = lambda what, error: f"rank 0 lost others in {what}: {error}"
    with pytest.raises(LostRankError, match="rank 0 lost others in all_reduce: "), found.on("all_reduce"):
        raise error


def test_what_others_died_of_is_not_this_devices_error() -> None:
    found = Waiting()
    with pytest.raises(DivergenceError) as raised, found.on("all_reduce"):
        raise DivergenceError("rank 1 died of AcceleratorError: CUDA error")
    assert str(raised.value) == "rank 1 died of AcceleratorError: CUDA error"


class Transport:
    """Peers that answer what they are told to."""

    def __init__(self, answer: Any):
        self.answer = answer

    def serve(self, name: str, answer: Any) -> None:
        pass

    def ask(self, rank: int, *request: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def mesh_of(found: Waiting) -> Any:
    return SimpleNamespace(
        rank=1,
        unit=SimpleNamespace(ranks=(0, 1), rank=1, size=2),
        data=SimpleNamespace(rank=0),
        context=SimpleNamespace(waiting=found, stats=SimpleNamespace(unit_collectives=7)),
    )


@pytest.mark.parametrize(
    ("peer", "news"),
    [
        (EOFError(), "rank 0 is gone without a word: killed from outside"),
        ("at train.py:3 in main, busy", "rank 0 is at train.py:3 in main, busy"),
    ],
)
def test_the_notice_names_what_a_device_is_stuck_in(
    peer: Any, news: str, device: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("TP_PLUGIN_NOTICE_AFTER", "0.05")
    monkeypatch.setattr(hang_report, "say", said.append)
    monkeypatch.setattr(hang_report, "comes_first", lambda matter: True)
    found = Waiting()
    sessions: Any = SimpleNamespace(parked_since=None, parked="", leaving=False)
    points: Any = SimpleNamespace(clock=3, place="")
    transport: Any = Transport(peer)
    report = HangReport(mesh_of(found), transport, points, sessions, lambda: [])
    found.called_at = "train.py:12 in main"
    event = enqueue(found, "all_reduce of the tp group [0, 1]", device)
    for _ in range(200):
        if said:
            break
        time.sleep(0.01)
    time.sleep(0.1)
    event.come = True
    report.close()
    (line,) = said
    assert "rank 1 has waited 0 s in all_reduce of the tp group [0, 1], which its device was given at" in line
    assert "train.py:12 in main" in line and news in line
    assert report._where().endswith(", busy")


def test_devices_that_wait_for_each_other_are_seen(device: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_PLUGIN_ABORT_AFTER", "0.05")
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    found = Waiting()
    found.called_at = "train.py:12 in main"
    theirs = ("all_gather of the unit_cpu group [0, 1]", 1.0, 9.0, "train.py:9 in main")
    transport: Any = Transport(theirs)
    watch = MutualWait(mesh_of(found), transport, lambda rank, error: None)
    enqueue(found, "all_reduce of the tp group [0, 1]", device)
    assert watch._for_good() is None, "not for long enough"
    time.sleep(0.06)
    waits = watch._for_good()
    assert waits is not None and waits[0] == theirs
    assert waits[1][0] == "all_reduce of the tp group [0, 1]" and waits[1][3] == "train.py:12 in main"
    transport.answer = (waits[1][0], 1.0, 9.0, "")
    assert watch._for_good() is None, "both are in the same: it is only slow"


def lines_case() -> list[str]:
    """Where collectives of a forward and a backward say that the script is; the script is this file."""
    from models import batch

    _, sharded = pair(2)
    found = sharded.tp_record.mesh.context.waiting
    is_on_host = patch.object(host_copy, "is_on_host", lambda tensor: tensor.dtype != torch.float32)
    with patch.object(torch, "Event", Event), is_on_host:
        loss = sharded(**batch(97, 0)).loss
        forward = {wait.line for _, wait in found._outstanding}
        found._outstanding.clear()
        total = loss.double()  # not copied to the host
        total.backward()
        return [*forward, *{wait.line for _, wait in found._outstanding}, found.called_at]


def test_lines_of_forward_and_backward() -> None:
    for forward, backward, after in run(2, lines_case):
        assert "test_waiting.py" in forward and "in lines_case" in forward
        assert "test_waiting.py" in backward and "in lines_case" in backward and forward != backward
        assert after == ""


def lost_case() -> str:
    _, sharded = pair(2)
    context = sharded.tp_record.mesh.context

    def fail() -> None:
        with context.waiting.on("all_reduce of the tp group [0, 1]", True):
            raise RuntimeError("Connection closed by peer")

    return expect("a lost rank", fail)


def test_the_runtime_explains_lost_ranks() -> None:
    for rank, message in enumerate(run(2, lost_case)):
        assert f"rank {rank} lost other ranks in all_reduce of the tp group [0, 1]" in message
