"""How tensors of one sharded model that look whole reach the other ranks of the unit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.runtime.runtime import Runtime
from tp_plugin.runtime.script_position import script_line
from tp_plugin.runtime.sync_points import READ
from tp_plugin.tensor.global_view import GlobalInfo


class ModelPeers:
    """See :class:`tp_plugin.tensor.global_view.info.Peers`.

    Attributes:
        read: reads the whole parameter of a name from ranks that are elsewhere.
    """

    def __init__(self, runtime: Runtime, number: int, read: Callable[[str], torch.Tensor]):
        self.runtime, self.mesh, self.read = runtime, runtime.mesh, read
        self._number = number  # of the model: two may have parameters of one name

    def stamp(self) -> object:
        """Steps entered, and what the script wrote."""
        return self.runtime.region.steps, self.runtime.region.writes

    def written(self, tensor: Any) -> None:
        """A view gathered before has old values, and another thread must not read before the write is through."""
        self.runtime.region.writes += 1
        self.runtime.progress.weights_changed(tensor.device)

    def meet(self, what: str) -> bool:
        """Wait for the ranks of the unit; False: the leader reads alone.

        Raises:
            DivergenceError: the ranks read different things.
        """
        mine = crc32(f"{self._number}/{what}".encode())
        rows = self.runtime.sync_points.rendezvous(READ, [mine])
        if any(row[0] != mine for row in rows):
            raise DivergenceError(
                f"{script_line()}: this rank reads {what} whole, and another rank of the TP group something else; the "
                "ranks of a TP group are one process and must make the same calls in the same order"
            )
        return len(rows) == self.mesh.unit.size

    def line(self) -> str:
        """The line of the script."""
        return script_line()

    def show(self, parameter: Any, info: GlobalInfo) -> None:
        """It looks whole in the script's region."""
        self.runtime.region.add(parameter, info)

    def keep(self, tensor: Any, whole: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The whole of ``tensor``, held until the next step."""
        return self.runtime.region.keep(tensor, whole)

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Code that means what this rank holds."""
        return self.runtime.region.step()

    def script(self) -> contextlib.AbstractContextManager[None]:
        """A hook of the script's, in the middle of a step."""
        return self.runtime.region.script()
