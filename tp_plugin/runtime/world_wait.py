"""Waiting for all ranks of the world without a collective: one of them may be writing for longer than torch waits.

Ranks of other units know of a save only what the store holds: who has arrived, and a number that grows while a save
goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from tp_plugin.errors import LostRankError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.sessions import Sessions

PROGRESS = "tp_plugin/progress"


class WorldWait:
    """Call it on every rank of the world, before the collective that follows a save.

    Args:
        deaths: the reports that dying ranks have left.
        save_timeout: seconds without progress anywhere after which the wait is given up.
    """

    def __init__(self, mesh: Mesh, sessions: Sessions, deaths: Callable[[], list[str]], save_timeout: float):
        self._mesh, self._deaths, self._save_timeout = mesh, deaths, save_timeout
        if mesh.dp_size > 1:
            sessions.tell_world = lambda: dist.distributed_c10d._get_default_store().add(PROGRESS, 1)

    def __call__(self) -> None:
        """Return when all ranks have come.

        Raises:
            LostRankError: one has died, or nothing has gone on for too long.
        """
        if self._mesh.dp_size == 1:
            return
        store, world = dist.distributed_c10d._get_default_store(), self._mesh.world.size
        place, deaths = f"tp_plugin/world/{next(self._mesh.made.waits)}", self._deaths()
        store.add(place, 1)
        begun = since = time.monotonic()
        seen = -1
        with self._mesh.context.waiting.on("the wait for a save of the world"):
            while (there := store.add(place, 0)) < world:
                progress = store.add(PROGRESS, 0) + there
                if progress != seen:
                    seen, since = progress, time.monotonic()
                news = self._deaths()[len(deaths) :]
                if news or time.monotonic() - since > self._save_timeout:
                    why = "; ".join(news) or f"nothing was saved for {self._save_timeout:.0f} s (save_timeout)"
                    raise LostRankError(f"{there} of {world} ranks came to the end of a save: {why}")
                time.sleep(min(1.0, 0.002 + (time.monotonic() - begun) / 20))  # late by a twentieth of the wait
