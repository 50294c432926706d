"""A process group by its role: every collective of the plugin goes through a :class:`Group`.

It does nothing in a group of one, books what it does in :class:`CommStats`, and says in :class:`Waiting` where it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.mesh import traced_ops
from tp_plugin.mesh.comm_stats import CommStats
from tp_plugin.mesh.deferred_release import DeferredRelease
from tp_plugin.mesh.patience import all_gather_while
from tp_plugin.mesh.waiting import Waiting

UNIT = ("tp", "pp", "pp_back", "unit", "unit_cpu")
"""Roles whose ranks are of one unit."""

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class CommContext:
    """What all groups of a process share."""

    stats: CommStats = field(default_factory=CommStats)
    waiting: Waiting = field(default_factory=Waiting)
    deferred: DeferredRelease = field(default_factory=DeferredRelease)


class Pending:
    """A collective under way; its tensors must not be touched before :meth:`wait`."""

    def __init__(self, result: torch.Tensor, wait: Callable[[], None] | None = None):
        self._result, self._wait = result, wait

    def wait(self) -> torch.Tensor:
        """Its result. A second call returns it at once."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()
        return self._result


class Group:
    """The ranks that one role of this rank names, in order; ``rank`` is this process's index among them.

    Args:
        role: ``tp``, ``data``, … : what the ranks are to each other; collectives are booked under it.
        ranks: global ranks.
        pg: their process group; None only in a group of one.
        context: what it shares with the other groups of the process.
        is_unit: whether these are all ranks of a unit; default by the role, for units of one stage.
    """

    def __init__(
        self,
        role: str,
        ranks: Sequence[int],
        pg: dist.ProcessGroup | None,
        context: CommContext | None = None,
        is_unit: bool | None = None,
    ):
        self.role, self.ranks, self.pg = role, tuple(ranks), pg
        self.is_unit = role in ("tp", "unit", "unit_cpu") if is_unit is None else is_unit
        self.context = context or CommContext()
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank()) if self.size > 1 else 0
        self.traced_name = f"{role}/{pg.group_name if pg is not None else ''}"
        traced_ops.groups[self.traced_name] = self
        self._words: dict[str, str] = {}

    @functools.cached_property
    def takes_host(self) -> bool:
        """Whether its backend takes tensors in host memory, which NCCL does not."""
        return self.pg is None or "gloo" in dist.get_backend_config(self.pg)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the ranks, as a tensor of its own. Traced by torch.compile."""
        if torch.compiler.is_compiling():
            total: torch.Tensor = traced_ops.all_reduce(tensor, self.traced_name, self.size)
            return total
        return self.all_reduce(tensor.clone(memory_format=torch.contiguous_format))

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce ``tensor`` in place and return it."""
        if self.size > 1:
            self._run("all_reduce", tensor, lambda: dist.all_reduce(tensor, op=op, group=self.pg))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The equally shaped tensors of all ranks, in rank order: views of one tensor. Traced by torch.compile."""
        return list(self.gathered(tensor).unbind(0))

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The equally shaped tensors of all ranks, in rank order, as one: (…) → (size, …). Traced by torch.compile."""
        if self.size == 1:
            return tensor[None]
        if torch.compiler.is_compiling():
            stacked: torch.Tensor = traced_ops.all_gather(tensor, self.traced_name, self.size)
            return stacked
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._run("all_gather", tensor, lambda: _all_gather(gathered.view(-1), tensor.view(-1), group=self.pg))
        return gathered

    def reduce_scatter(self, chunks: torch.Tensor) -> torch.Tensor:
        """``chunks`` (size, …), contiguous → the ranks' sum of this rank's chunk (…). Traced by torch.compile."""
        if self.size == 1:
            return chunks[0]
        if torch.compiler.is_compiling():
            scattered: torch.Tensor = traced_ops.reduce_scatter(chunks, self.traced_name, self.size)
            return scattered
        mine = torch.empty_like(chunks[0])
        self._run("reduce_scatter", chunks, lambda: _reduce_scatter(mine.view(-1), chunks.view(-1), group=self.pg))
        return mine

    def start_all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Begin to sum ``tensor`` in place."""
        if self.size == 1:
            return Pending(tensor)
        start = functools.partial(dist.all_reduce, tensor, group=self.pg, async_op=True)
        return self._start("all_reduce", tensor, tensor, start)

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Begin to gather the equally shaped tensors of all ranks, in rank order: (…) → (size, …)."""
        if self.size == 1:
            return Pending(tensor[None])
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        start = functools.partial(_all_gather, gathered.view(-1), tensor.view(-1), group=self.pg, async_op=True)
        return self._start("all_gather", tensor, gathered, start)

    def start_reduce_scatter(self, chunks: torch.Tensor) -> Pending:
        """Begin what :meth:`reduce_scatter` does."""
        if self.size == 1:
            return Pending(chunks[0])
        mine = torch.empty_like(chunks[0])
        start = functools.partial(_reduce_scatter, mine.view(-1), chunks.view(-1), group=self.pg, async_op=True)
        return self._start("reduce_scatter", chunks, mine, start)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Broadcast ``tensor`` in place from the group's rank ``src`` and return it."""
        if self.size > 1:
            self._run("broadcast", tensor, lambda: dist.broadcast(tensor, group=self.pg, group_src=src))
        return tensor

    def start_send(self, tensor: torch.Tensor, to: int) -> Pending:
        """Begin to send ``tensor``, contiguous, to the group's rank ``to``."""
        return self._start("send", tensor, tensor, lambda: dist.isend(tensor, group=self.pg, group_dst=to))

    def start_receive(self, tensor: torch.Tensor, source: int) -> Pending:
        """Begin to receive into ``tensor``, contiguous, what the group's rank ``source`` sends."""
        return self._start("receive", tensor, tensor, lambda: dist.irecv(tensor, group=self.pg, group_src=source))

    def all_gather_while(self, tensor: torch.Tensor, reason: Callable[[], bool]) -> list[torch.Tensor]:
        """:meth:`all_gather` on gloo, which the group's timeout does not end while ``reason()`` is true."""
        if self.pg is None or self.size == 1:
            return [tensor]
        gathered: list[torch.Tensor] = self._run(
            "all_gather", tensor, functools.partial(all_gather_while, self.pg, tensor, reason)
        )
        return gathered

    def gather(self, tensor: torch.Tensor, into: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """The equally shaped tensors of all ranks in rank order, on rank 0, which gives room for them; else nothing."""
        if self.size == 1:
            return [tensor]
        self._run("gather", tensor, lambda: dist.gather(tensor, into, group=self.pg, group_dst=0))
        return into or []

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The object that rank ``src`` passed, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        self._run("broadcast_object", None, lambda: dist.broadcast_object_list(box, group=self.pg, group_src=src))
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The objects of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._run("all_gather_object", None, lambda: dist.all_gather_object(values, value, group=self.pg))
        return values

    def record(self, op: str, size: int) -> None:
        """Book a collective of ``size`` bytes that somebody else runs in this group."""
        self.context.stats.record(op, self.role, size)

    def _start(self, op: str, put: torch.Tensor, result: torch.Tensor, call: Callable[[], Any]) -> Pending:
        what, dropped = self._enter(op, put)
        waiting = self.context.waiting
        work = waiting.run(what, False, None, call)

        def wait() -> None:
            waiting.run(what, self.role in UNIT, result, work.wait)
            if dropped:
                self.context.deferred.after(dropped, result.device)

        return Pending(result, wait)

    def _run(self, op: str, tensor: torch.Tensor | None, call: Callable[[], Any]) -> Any:
        what, dropped = self._enter(op, tensor)
        result = self.context.waiting.run(what, self.role in UNIT, tensor, call)
        if dropped:
            self.context.deferred.after(dropped, torch.device("cpu") if tensor is None else tensor.device)
        return result

    def _enter(self, op: str, tensor: torch.Tensor | None) -> tuple[str, list[Any]]:
        """Book a collective; returns it in words, and what this rank has dropped before it."""
        stats = self.context.stats
        stats.record(op, self.role, 0 if tensor is None else tensor.numel() * tensor.element_size())
        what = self._words.get(op)
        if what is None:
            what = self._words[op] = f"{op} of the {self.role} group {list(self.ranks)}"
        if not self.is_unit:
            return what, []
        stats.unit_collectives += 1
        return what, self.context.deferred.before()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copied model communicates in the same groups
