"""Which collective this rank is waiting in, and since when: what the threads that report a hang want to know.

A collective of the host blocks the thread that calls it. One of a device returns at once, and the device waits: an
event behind it says when it is through. Which of them a rank waits in is then the oldest whose event is still to come.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tp_plugin.errors import DivergenceError, LostRankError
from tp_plugin.mesh import host_copy

OUTSTANDING = 256
"""Collectives given to a device that are remembered; of more, the oldest and the newest."""

_DEVICE_ERRORS = (
    "CUDA error", "HIP error", "XPU error", "NPU error", "device-side assert", "out of memory", "unhandled cuda error",
    "CUBLAS_STATUS", "CUDNN_STATUS",
)  # fmt: skip
"""What a backend's error says if this rank's own device failed. (NCCL wraps it in an error of its own.)"""


class Wait(NamedTuple):
    """One collective.

    Attributes:
        what: it, in words.
        in_unit: whether only ranks of this rank's unit take part in it.
        since: ``time.monotonic()`` of when this rank began to wait in it.
        line: where the script was when the device was given it; empty if the script is still there.
    """

    what: str
    in_unit: bool
    since: float
    line: str = ""

    def seconds(self) -> float:
        """For how long this rank has been in it."""
        return time.monotonic() - self.since

    def __str__(self) -> str:
        return f"{self.what}, which its device was given at {self.line}" if self.line else self.what


class Waiting:
    """The collectives that this rank is in. Any thread may ask.

    Attributes:
        explain: given the collective and the backend's error, what is known of the other ranks; set by who can ask.
        script_line: says where the script is; set by who can tell.
        called_at: where it called the forward or backward that runs: autograd's threads cannot see it, and nobody looks
            for it at each collective. Empty outside of these.
    """

    def __init__(self) -> None:
        self.explain: Callable[[str, RuntimeError], str] | None = None
        self.script_line: Callable[[], str] = str
        self._host: tuple[str, bool, float] | None = None
        self.called_at = ""
        self._outstanding: deque[tuple[torch.Event, Wait]] = deque()
        self._moved = 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def on(self, what: str, in_unit: bool = False, tensor: torch.Tensor | None = None) -> Iterator[None]:
        """Inside, this rank waits in ``what``: as :meth:`run`, for code that is no one call."""
        self._host = began = what, in_unit, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._host = None
            self._explained(error, what)
            raise
        finally:
            self._host = None
        if tensor is not None and not host_copy.is_on_host(tensor):
            self._follow(Wait(*began), tensor.device)

    def run(self, what: str, in_unit: bool, tensor: torch.Tensor | None, call: Callable[[], Any]) -> Any:
        """What ``call`` returns: meanwhile this rank waits in ``what``, behind it a device does if ``tensor`` is there.

        Raises:
            LostRankError: the backend raised; the message says what is known of the other ranks.
            RuntimeError: the backend's own, with a note, where it is this rank's device that failed.
        """
        self._host = began = what, in_unit, time.monotonic()  # every collective of a step comes here: few calls
        try:
            result = call()
        except RuntimeError as error:
            self._host = None
            self._explained(error, what)
            raise
        finally:
            self._host = None
        if tensor is not None and not host_copy.is_on_host(tensor):
            self._follow(Wait(*began), tensor.device)
        return result

    def _explained(self, error: RuntimeError, what: str) -> None:
        """Raise what is known of it, if it is of the other ranks; else note it and return."""
        if isinstance(error, DivergenceError):
            return
        if _is_of_device(error):
            _note(error, what)
        elif self.explain is not None:
            raise LostRankError(self.explain(what, error)) from error

    def now(self) -> Wait | None:
        """The collective that this rank has been in for the longest; None outside of collectives."""
        device, began = self._oldest(), self._host
        host = None if began is None else Wait(*began)
        return min((wait for wait in (device, host) if wait is not None), key=lambda wait: wait.since, default=None)

    def seconds(self) -> float:
        """For how long this rank has been in it; 0 outside of one."""
        wait = self.now()
        return 0.0 if wait is None else wait.seconds()

    def _follow(self, wait: Wait, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # it runs when the graph does, and its event could not be asked
        event = torch.Event(device)
        event.record()
        with self._lock:
            self._forget_finished()
            if len(self._outstanding) >= OUTSTANDING:
                self._outstanding.pop()
            self._outstanding.append((event, wait._replace(line=self.called_at or self.script_line())))

    def _oldest(self) -> Wait | None:
        with self._lock:
            self._forget_finished()
            if not self._outstanding:
                return None
            wait = self._outstanding[0][1]
            return wait._replace(since=max(wait.since, self._moved))  # before, the device was busy with others

    def _forget_finished(self) -> None:
        while self._outstanding and _is_through(self._outstanding[0][0]):
            self._outstanding.popleft()
            self._moved = time.monotonic()


def _is_through(event: torch.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:
        return True  # the device has failed, which the thread that uses it is told


def _is_of_device(error: RuntimeError) -> bool:
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _DEVICE_ERRORS)


def _note(error: RuntimeError, what: str) -> None:
    """Keep the error's kind and text, which scripts look at."""
    text, *rest = error.args or ("",)
    error.args = (f"{text}\n(tp_plugin: in {what}. It is this rank's own device that failed, no rank is lost.)", *rest)
