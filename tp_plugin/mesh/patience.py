"""A collective on gloo that outlasts its group's timeout while there is a reason to wait.

A rank that saves a large model alone takes longer than the timeout by which a hung rank is noticed. gloo ends a
collective at its timeout for good; so this one has none, and the waiting is done here.
"""

from __future__ import annotations

import ctypes
import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

ENDLESS = datetime.timedelta(days=30)

LOOKS = 4
"""How often in a timeout the reason is looked for."""


def all_gather_while(pg: dist.ProcessGroup, tensor: torch.Tensor, reason: Callable[[], bool]) -> list[torch.Tensor]:
    """The tensors of all ranks of a group on gloo; waits for its timeout since ``reason()`` last was true.

    Raises:
        RuntimeError: a rank did not come in that time, or is gone.
    """
    timeout: datetime.timedelta = pg._get_backend(torch.device("cpu")).options._timeout
    gathered = [torch.empty_like(tensor) for _ in range(pg.size())]
    options = AllgatherOptions()
    options.timeout = ENDLESS
    work = pg.allgather([gathered], [tensor], options)
    deadline = time.monotonic() + timeout.total_seconds()
    while not _is_through(work, timeout / LOOKS):
        if reason():
            deadline = time.monotonic() + timeout.total_seconds()
        elif time.monotonic() > deadline:
            # torch would wait for it at exit
            _leave_behind([pg, work, tensor, *gathered])
            raise RuntimeError(f"Timed out after waiting {timeout.total_seconds():.0f} s for the other ranks")
    return gathered


def _is_through(work: Any, patience: datetime.timedelta) -> bool:
    try:
        work.wait(patience)
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def _leave_behind(values: list[Any]) -> None:
    for value in values:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
