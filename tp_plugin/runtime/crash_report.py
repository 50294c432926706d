"""What a rank of the world says before it dies, and where a rank is.

Words are left in torch.distributed's key-value store, which every launcher keeps outside of the ranks or on rank 0: so
they reach the ranks of other TP groups too, and outlive who said them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from types import FrameType

import torch.distributed as dist

DEATHS = "tp_plugin/deaths"
LONGEST = 1200
"""Characters of a message that are kept."""

_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}tp_plugin{os.sep}", f"{os.sep}lib{os.sep}python", "<frozen")


def leave(rank: int, error: BaseException) -> None:
    """Tell the world of what ``rank`` is dying."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame for frame in reversed(frames) if _is_own(frame.filename)), frames[-1] if frames else None)
    where = f" at {own.filename}:{own.lineno}" if own is not None else ""
    text = f"rank {rank} died of {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # there may be no store any more
        store = dist.distributed_c10d._get_default_store()
        number = store.add(DEATHS, 1)
        store.set(f"{DEATHS}/{number}", f"{text[:LONGEST]}{where}")


def read() -> list[str]:
    """What was said so far in the world, first who died first."""
    found: list[str] = []
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        for number in range(1, store.add(DEATHS, 0) + 1):
            if store.check([f"{DEATHS}/{number}"]):
                found.append(store.get(f"{DEATHS}/{number}").decode())
    return found


def whereabouts() -> str:
    """The line of the script at which the main thread of this process is."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and not _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame is not None else "nowhere"


def _is_own(file: str) -> bool:
    return not any(part in file for part in _LIBRARIES)
