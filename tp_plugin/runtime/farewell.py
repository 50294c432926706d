"""The end of a script: the ranks of a unit leave together, so that one which only saves a last time finds its peers."""

from __future__ import annotations

import os
import sys
import threading
import time

import torch.distributed as dist

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.crash_report import CrashReport, leave
from tp_plugin.runtime.hang_report import say
from tp_plugin.runtime.last_micro_batch import OtherMicroBatchError
from tp_plugin.runtime.sessions import Sessions
from tp_plugin.runtime.sync_points import END, SyncPoints

STUCK = 20.0
"""Seconds in one collective after which a rank is taken to wait for one that has come to its end."""


class Farewell:
    """What this rank does at exit."""

    def __init__(self, mesh: Mesh, sessions: Sessions, sync_points: SyncPoints, crash_report: CrashReport):
        self._mesh, self._sessions, self._sync_points, self._crash_report = mesh, sessions, sync_points, crash_report
        self._pid = os.getpid()
        self._found: OtherMicroBatchError | None = None

    def __call__(self) -> None:
        """Wait for the others.

        Peers help with the leader's last forwards and are read meanwhile (after ``destroy_process_group``: only read).
        A rank that waits in vain is not waited for: it is stuck in a collective because this one came to its end.
        If the last micro-batch was not one on all ranks, the process fails: its last step, and what it saved, is wrong.
        """
        if self._crash_report.crashed or os.getpid() != self._pid:
            return  # what others wait for will not come, or this is a fork of the rank
        self._sessions.leaving = True
        meeting = threading.Thread(target=self._meet, daemon=True)
        meeting.start()
        while meeting.is_alive():
            meeting.join(timeout=0.05)
            stuck = [] if self._sync_points.helping else [r for r in self._sessions.peers() if self._is_stuck(r)]
            if stuck:
                ranks = [self._mesh.unit.ranks[rank] for rank in stuck]
                print(
                    f"tp_plugin: rank {self._mesh.rank} is at the end of its script; ranks {ranks} of its TP group "
                    f"have been in a collective for {STUCK:.0f} s and are left there",
                    file=sys.stderr,
                )
                return
        if self._found is not None:
            leave(self._mesh.rank, self._found)
            say(f"rank {self._mesh.rank}, at the end of its script: {self._found}")
            sys.stdout.flush()
            os._exit(1)  # an exception here would not fail the process

    def _meet(self) -> None:
        if dist.is_initialized():
            try:
                self._sync_points.rendezvous(END)
            except OtherMicroBatchError as error:
                self._found = error
            except DivergenceError:
                pass  # raised on the rank that is not at its end, too
            return
        while not self._mesh.is_leader and (status := self._sessions.status(0)) and not status["leaving"]:
            time.sleep(0.05)

    def _is_stuck(self, rank: int) -> bool:
        status = self._sessions.status(rank)
        return status is not None and not status["leaving"] and status["busy"] > STUCK
