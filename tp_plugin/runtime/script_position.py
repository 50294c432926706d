"""Where the script of this process is, for messages: the line of the main thread that is the user's own."""

from __future__ import annotations

import functools
import os
import sys
import threading
import traceback
from types import FrameType

import torch.distributed as dist

_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}tp_plugin{os.sep}", f"{os.sep}lib{os.sep}python", "<frozen")


def script_line() -> str:
    """The line of the script at which the main thread of this process is."""
    innermost: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    frame = innermost
    try:
        while frame is not None and not _is_own(frame.f_code.co_filename):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "nowhere"
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    finally:
        del frame, innermost  # it may be this very frame: a cycle would keep all frames, and what they hold


def failing_line(error: BaseException) -> str:
    """The script's innermost line in an exception's traceback, else the innermost line of all; empty without one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame for frame in reversed(frames) if _is_own(frame.filename)), frames[-1] if frames else None)
    return f"{own.filename}:{own.lineno}" if own is not None else ""


def in_torch_collective() -> bool:
    """Whether the script itself is in a function of torch.distributed, such as a barrier."""
    frames = sys._current_frames()
    number = threading.main_thread().ident or 0
    return number in frames and frames.pop(number).f_code.co_filename == dist.distributed_c10d.__file__


@functools.cache
def _is_own(file: str) -> bool:
    return not any(part in file for part in _LIBRARIES)
