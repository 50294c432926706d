"""Points at which the ranks of a unit meet, and what happens when they are not at the same one.

A forward, a barrier, a batch, a gather: each begins with one all-gather of a small header over ``unit_cpu``. Ranks that
diverged learn it there at once, on every rank, instead of hanging in collectives that do not match. With it goes what
they have yet to compare of the last micro-batch.

One divergence is ordinary: ``if accelerator.is_main_process: evaluate(model)``. When the leader is in a forward without
gradients, or in ``generate``, and its peers are at a later point, the peers help: they make the same call on their
shards and wait again. When it takes a batch alone, or reads a parameter, they only wait again.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.last_micro_batch import WORDS, LastMicroBatch
from tp_plugin.runtime.published import PublishedTensors
from tp_plugin.tensor import rng

PLACES = (
    "a forward",
    "generate",
    "wait_for_everyone",
    "the next batch of a data loader",
    "check_trigger",
    "a gather, reduce or broadcast of Accelerate",
    "a read of a whole parameter or gradient",
    "the end of the script",
)
FORWARD, GENERATE, BARRIER, BATCH, TRIGGER, COLLECTIVE, READ, END = range(len(PLACES))

_WIDTH = 6
"""Values in a header that belong to its place."""

GRADIENTS = 1
"""Bit of a forward's first value: gradients are recorded."""


@dataclass
class Request:
    """What a peer needs to make the leader's call: a method of the model, its arguments, and the state it runs in."""

    method: str
    args: Any
    kwargs: Any
    training: bool
    generators: dict[str, Any]

    @staticmethod
    def of(method: str, model: nn.Module, args: Any, kwargs: Any) -> bytes | None:
        """The request as bytes, or None if an argument lives on this rank only (a KV cache)."""
        if any(type(value).__name__.endswith("Cache") for value in (*args, *kwargs.values())):
            return None  # a cache holds this rank's heads
        host_args, host_kwargs = tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs))
        try:
            sent = io.BytesIO()
            _Pickler(sent).dump(Request(method, host_args, host_kwargs, model.training, rng.snapshot()))
            return sent.getvalue()
        except (pickle.PicklingError, TypeError, AttributeError):
            return None


class _Pickler(pickle.Pickler):
    """Sharded models among the arguments (an assistant) go by their number."""

    def persistent_id(self, value: Any) -> int | None:
        record: Any = getattr(value, "tp_record", None) if isinstance(value, nn.Module) else None
        return None if record is None else int(record.number)


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: bytes, find: Callable[[int], nn.Module]):
        super().__init__(io.BytesIO(message))
        self._find = find

    def persistent_load(self, number: int) -> nn.Module:
        return self._find(number)


class SyncPoints:
    """This rank's part in the sync points of its unit.

    Attributes:
        clock: sync points so far; equal on all ranks of the unit at equal points of the program.
        place: where this rank waits for the others, or came to when it lost them.
        helping: in a call that not all ranks came to by themselves: its forwards meet nowhere.
        depth: how many forwards this rank is inside of.
        leader_alone: in a forward that the leader came to alone, and its peers by its request.
        generating: in ``generate``.
        somebody_saves: whether another rank of the unit is in a save that goes on; it is waited for beyond the group's
            timeout. Set by who can ask.
    """

    def __init__(self, mesh: Mesh, published: PublishedTensors, last_micro_batch: LastMicroBatch):
        self.mesh, self._published, self._last = mesh, published, last_micro_batch
        self.somebody_saves: Callable[[], bool] = lambda: False
        self.clock = 0
        self.place = ""
        self.helping = self.leader_alone = self.generating = False
        self.depth = 0

    @property
    def wants_full_logits(self) -> bool:
        """Whether logits are wanted whole, at once: what is read of them is read by ranks that do not meet again."""
        return self.helping or self.leader_alone or self.generating

    def rendezvous(
        self,
        place: int,
        values: Sequence[int] = (),
        request: Callable[[], bytes | None] | None = None,
        rounded: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """Wait for the other ranks at ``place``; returns everyone's ``values`` in rank order (one row: helped).

        Args:
            place: one of the constants of this module.
            values: up to six integers; for a forward or generate (mode bits, model number, digest of the arguments).
            request: for a forward or generate, gives what a helper needs (:meth:`Request.of`).
            rounded: for a forward, see :meth:`LastMicroBatch.compare`.

        Raises:
            DivergenceError: on every rank, naming where each is.
            OtherMicroBatchError: on every rank; they are at one place, but the last micro-batch was not one.
        """
        self.clock += 1
        while True:
            mine = [place, *values, *[0] * (_WIDTH - len(values))]
            last = self._last.words()
            header = torch.tensor([*mine, *last, self.clock, *self._published.report_live()], device="cpu")
            rows = self._gather(header, place)
            self.clock = max(row[-3] for row in rows)
            self._published.release_dead([(count, gone) for *_, count, gone in rows])
            if not self._leader_is_alone(rows):
                if all(row[0] == place for row in rows):
                    self._last.compare([row[1 + _WIDTH :][:WORDS] for row in rows], rounded)
                    return [row[1 : 1 + _WIDTH] for row in rows]
                raise DivergenceError(self._where(rows))
            if rows[0][0] in (BATCH, READ):  # by itself: its peers have no part in that, or give their shards meanwhile
                if self.mesh.is_leader:
                    return [mine[1:]]
                continue
            message = request() if self.mesh.is_leader and request is not None else None
            message = self.mesh.unit_cpu.broadcast_object(message)
            if message is None:
                raise DivergenceError(self._where(rows))
            if self.mesh.is_leader:
                return [mine[1:]]
            self._help(self._published.model(rows[0][2]), _Unpickler(message, self._published.model).load())

    def _gather(self, header: torch.Tensor, place: int) -> list[list[int]]:
        self.place = PLACES[place]
        rows = self.mesh.unit_cpu.all_gather_while(header, self.somebody_saves)
        self.place = ""
        if place == END:
            _outlive_the_interpreter([header, *rows])
            time.sleep(0.1)  # on a busy machine the threads of other groups may not have let go of theirs
        return [row.tolist() for row in rows]

    def _leader_is_alone(self, rows: list[list[int]]) -> bool:
        leader, *peers = rows
        # a forward in another mode is another place too; with another batch it is an error, which the guard explains
        same = slice(0, 3) if leader[0] == FORWARD else slice(0, 4)
        alone = all(row[same] != leader[same] for row in peers)
        return alone and (leader[0] in (GENERATE, BATCH, READ) or (leader[0] == FORWARD and not leader[1] & GRADIENTS))

    def _help(self, model: nn.Module, request: Request) -> None:
        device = next(model.parameters()).device
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (request.args, request.kwargs))
        modes = {module: module.training for module in model.modules()}
        generators = rng.snapshot()
        self.helping = True
        try:
            with torch.no_grad():
                model.train(request.training)
                rng.restore(request.generators)
                getattr(model, request.method)(*args, **kwargs)
        finally:
            self.helping = False
            rng.restore(generators)
            for module, mode in modes.items():
                module.training = mode

    def _where(self, rows: list[list[int]]) -> str:
        at = ", ".join(f"rank {rank} at {PLACES[row[0]]}" for rank, row in zip(self.mesh.unit.ranks, rows, strict=True))
        return (
            f"the ranks of a TP group are at different places of the script: {at}. They are one process and must make "
            "the same calls. On the main process alone only generate and forwards without gradients can run, with "
            "arguments that can be sent to the other ranks (no KV cache)"
        )


def _outlive_the_interpreter(tensors: list[torch.Tensor]) -> None:
    # gloo's thread lets go of a collective's tensors some time after the collective is through. Were its reference the
    # last, it would ask a finalizing interpreter for the GIL, which aborts the process (plain torch: 3 of 100 exits).
    for tensor in tensors:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))
