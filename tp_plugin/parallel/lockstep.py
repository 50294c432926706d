"""Points at which the ranks of a TP group meet, and what happens when they are not at the same one.

A forward, a barrier, a batch, a trigger: each begins with one all-gather of a small header on the control group. Ranks
that diverged learn it there at once, on every rank, instead of hanging in collectives that do not match.

One divergence is ordinary: ``if accelerator.is_main_process: evaluate(model)``. When the leader is in a forward without
gradients and its peers are at a later point, the peers help: they run the same forward on their shards and wait again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tp_plugin.errors import DivergenceError
from tp_plugin.parallel.mesh import Mesh

PLACES = ("a forward", "wait_for_everyone", "the next batch of a data loader", "check_trigger", "the end of the script")
FORWARD, BARRIER, BATCH, TRIGGER, END = range(len(PLACES))

_WIDTH = 4
"""Values in a header that belong to its place."""

Census = tuple[int, int]
"""How many sources a rank has published, and a bit mask of those whose owner is gone (see exchange.py)."""

GRADIENTS = 1
"""Bit of a forward's first value: gradients are recorded."""


class Lockstep:
    """This rank's part in the meetings of its TP group."""

    def __init__(self, mesh: Mesh, census: Callable[[], Census], bury: Callable[[list[Census]], None]):
        self.mesh, self._census, self._bury = mesh, census, bury
        self.clock = 0
        """Meetings so far; equal on all ranks of the group at equal points of the program."""
        self.helping = False
        self._models: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def watch(self, number: int, model: nn.Module) -> None:
        """Let the leader ask for help with forwards of ``model``, by its number (equal on all ranks)."""
        self._models[number] = model

    def meet(self, place: int, values: Sequence[int] = (), request: Callable[[], Any] | None = None) -> list[list[int]]:
        """Wait for the other ranks at ``place``; returns everyone's ``values`` in TP rank order.

        Args:
            place: one of the constants of this module.
            values: up to four integers; for a forward (mode bits, model number, batch digest, generator digest).
            request: for a forward, gives what a helper needs, ``(args, kwargs, training)``; None if it can't be sent.

        Raises:
            DivergenceError: on every rank, naming where each is.
        """
        self.clock += 1
        while True:
            mine = [place, *values, *[0] * (_WIDTH - len(values))]
            rows = self._gather(torch.tensor([*mine, self.clock, *self._census()]), place)
            self.clock = max(row[-3] for row in rows)
            self._bury([(count, gone) for *_, count, gone in rows])
            if not self._can_help(rows):
                if all(row[0] == place for row in rows):
                    return [row[1:-3] for row in rows]
                raise DivergenceError(self._where(rows))
            if self.mesh.is_leader:
                assert request is not None
                message = request()
                if self.mesh.control.broadcast_object(message) is None:
                    raise DivergenceError(self._where(rows))
                return [mine[1:]]
            message = self.mesh.control.broadcast_object(None)
            if message is None:
                raise DivergenceError(self._where(rows))
            self._help(rows[0][2], *message)

    def _gather(self, header: torch.Tensor, place: int) -> list[list[int]]:
        try:
            return [row.tolist() for row in self.mesh.control.all_gather(header)]
        except RuntimeError as error:
            raise DivergenceError(
                f"a rank of the TP group {list(self.mesh.tp.ranks)} has left the script, or took too long, while this "
                f"rank came to {PLACES[place]}: {error}"
            ) from error

    def _can_help(self, rows: list[list[int]]) -> bool:
        leader, *peers = rows
        # the same call in another mode is another place too; the same call with another batch is an error of the guard
        alone = all(row[0] != FORWARD or row[1:3] != leader[1:3] for row in peers)
        return leader[0] == FORWARD and alone and not leader[1] & GRADIENTS

    def _help(self, number: int, args: Any, kwargs: Any, training: bool) -> None:
        model = self._models[number]
        device = next(model.parameters()).device
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        modes = {module: module.training for module in model.modules()}
        self.helping = True
        try:
            with torch.no_grad():
                model.train(training)
                model(*args, **kwargs)
        finally:
            self.helping = False
            for module, mode in modes.items():
                module.training = mode

    def _where(self, rows: list[list[int]]) -> str:
        at = ", ".join(f"rank {rank} at {PLACES[row[0]]}" for rank, row in zip(self.mesh.tp.ranks, rows, strict=True))
        return (
            f"the ranks of a TP group are at different places of the script: {at}. They are one process and must make "
            "the same calls. On the main process alone only forwards without gradients and without a KV cache can run "
            "(generate: call it on every rank, or with use_cache=False)"
        )
