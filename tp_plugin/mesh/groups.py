"""The world of ``tp × dp`` ranks as groups. Ranks of one TP group are neighbours: rank = dp_rank · tp + tp_rank.

Every collective of the plugin goes through a :class:`Group`, which does nothing in a group of one and counts what it
does in :data:`ledger`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import DivergenceError, LostRankError, TPError
from tp_plugin.mesh import traced_ops
from tp_plugin.mesh.deferred_release import DeferredRelease

ledger: dict[str, Counter[str]] = {"count": Counter(), "bytes": Counter()}
"""Calls and bytes (of this rank's input) of each collective since start, keyed ``"<op>/<group>"``."""

training: dict[str, Counter[str]] = {"count": Counter(), "bytes": Counter()}
"""The part of the ledger that belongs to training: from a training forward up to the next forward of another kind."""

in_training = False

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13

busy_since: float | None = None
"""When the collective that this rank is in began (time.monotonic); read by the thread that answers its peers."""

busy_in = ""
"""Which one it is."""

explain: Callable[[str, RuntimeError], str] | None = None
"""What is known of the ranks of a collective that failed (set by the exchange, which can ask them)."""

meetings = 0
"""Collectives of the whole TP group that this rank has entered; equal on all its ranks at equal points."""

shelf = DeferredRelease()
"""What this rank has dropped since the last of them."""


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """This rank waits in the collective ``what``; an error there says what is known of the other ranks."""
    global busy_since, busy_in
    busy_since, busy_in = time.monotonic(), what
    try:
        yield
    except RuntimeError as error:
        busy_since = None
        if explain is None or isinstance(error, DivergenceError | torch.OutOfMemoryError):
            raise
        raise LostRankError(explain(what, error)) from error
    finally:
        busy_since = None


class Pending:
    """A collective under way; its tensors must not be touched before :meth:`wait`."""

    def __init__(self, result: torch.Tensor, work: Any = None, what: str = "", dropped: Sequence[Any] = ()):
        self._result, self._work, self._what, self._dropped = result, work, what, list(dropped)

    def wait(self) -> torch.Tensor:
        """Its result. A second call returns it at once."""
        if self._work is not None:
            work, self._work = self._work, None
            with _waiting(self._what):
                work.wait()
            shelf.after(self._dropped, on_device=self._result.is_cuda)
        return self._result


class Group:
    """A named process group of known ranks; ``rank`` is this process's index in it."""

    def __init__(self, name: str, ranks: tuple[int, ...], pg: dist.ProcessGroup | None):
        self.name, self.ranks, self.pg = name, ranks, pg
        self.size = len(ranks)
        self.rank = ranks.index(dist.get_rank()) if self.size > 1 else 0

    @functools.cached_property
    def takes_host(self) -> bool:
        """Whether its backend takes tensors in host memory, which NCCL does not."""
        return self.pg is None or "gloo" in dist.get_backend_config(self.pg)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the ranks, as a tensor of its own. Traced by torch.compile."""
        if torch.compiler.is_compiling():
            total: torch.Tensor = traced_ops.all_reduce(tensor, self.name, self.size)
            return total
        return self.all_reduce(tensor.clone(memory_format=torch.contiguous_format))

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce ``tensor`` in place and return it."""
        if self.size > 1:
            with self._at_work("all_reduce", tensor):
                dist.all_reduce(tensor, op=op, group=self.pg)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The equally shaped tensors of all ranks, in rank order. Traced by torch.compile."""
        if self.size == 1:
            return [tensor]
        if torch.compiler.is_compiling():
            return list(traced_ops.all_gather(tensor, self.name, self.size).unbind(0))
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._at_work("all_gather", tensor):
            dist.all_gather(gathered, tensor, group=self.pg)
        return gathered

    def reduce_scatter(self, parts: torch.Tensor) -> torch.Tensor:
        """``parts`` (size, …), contiguous → the sum over all ranks of this rank's part (…). Traced by torch.compile."""
        if self.size == 1:
            return parts[0]
        if torch.compiler.is_compiling():
            scattered: torch.Tensor = traced_ops.reduce_scatter(parts, self.name, self.size)
            return scattered
        mine = torch.empty_like(parts[0])
        with self._at_work("reduce_scatter", parts):
            _reduce_scatter(mine.view(-1), parts.view(-1), group=self.pg)
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
        parts = list(gathered)
        start = functools.partial(dist.all_gather, parts, tensor, group=self.pg, async_op=True)
        return self._start("all_gather", tensor, gathered, start)

    def start_reduce_scatter(self, parts: torch.Tensor) -> Pending:
        """Begin what :meth:`reduce_scatter` does."""
        if self.size == 1:
            return Pending(parts[0])
        mine = torch.empty_like(parts[0])
        start = functools.partial(_reduce_scatter, mine.view(-1), parts.view(-1), group=self.pg, async_op=True)
        return self._start("reduce_scatter", parts, mine, start)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Broadcast ``tensor`` in place from the group's rank ``src`` and return it."""
        if self.size > 1:
            with self._at_work("broadcast", tensor):
                dist.broadcast(tensor, group=self.pg, group_src=src)
        return tensor

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The object that rank ``src`` passed, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self._at_work("broadcast_object"):
            dist.broadcast_object_list(box, group=self.pg, group_src=src)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The objects of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._at_work("all_gather_object"):
            dist.all_gather_object(values, value, group=self.pg)
        return values

    def _start(self, op: str, put: torch.Tensor, result: torch.Tensor, call: Callable[[], Any]) -> Pending:
        dropped = self._enter(op, put)
        with _waiting(self._what(op)):
            return Pending(result, call(), self._what(op), dropped)

    @contextlib.contextmanager
    def _at_work(self, op: str, tensor: torch.Tensor | None = None) -> Iterator[None]:
        dropped = self._enter(op, tensor)
        with _waiting(self._what(op)):
            yield
        shelf.after(dropped, on_device=tensor is not None and tensor.is_cuda)

    def _what(self, op: str) -> str:
        return f"{op} of the {self.name} group {list(self.ranks)}"

    def _enter(self, op: str, tensor: torch.Tensor | None) -> list[Any]:
        """Book a collective; what the ranks have dropped before it."""
        global meetings
        entry(op, self, 0 if tensor is None else tensor.numel() * tensor.element_size())
        if self.name not in ("tp", "control"):
            return []
        meetings += 1
        return shelf.before()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copied model communicates in the same groups


def entry(op: str, group: Group, size: int) -> None:
    """Book one collective of ``size`` bytes in the ledger."""
    key = f"{op}/{group.name}"
    for book in (ledger, training) if in_training else (ledger,):
        book["count"][key] += 1
        book["bytes"][key] += size


@dataclass
class Mesh:
    """The groups of this rank. ``control`` is the TP group on gloo: guards, objects and RNG states on the host."""

    tp_size: int
    dp_size: int
    tp: Group
    dp: Group
    control: Group
    world: Group
    _subgroups: dict[tuple[int, ...], Group] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """What is to be closed with the mesh."""

    @property
    def rank(self) -> int:
        return self.dp.rank * self.tp_size + self.tp.rank

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its TP group."""
        return self.tp.rank == 0

    def tp_for(self, tensor: torch.Tensor) -> Group:
        """The TP group on a backend that takes ``tensor``: NCCL takes no host memory."""
        return self.control if tensor.device.type == "cpu" else self.tp

    def replicas(self, tp_ranks: tuple[int, ...]) -> Group:
        """The group of these ranks of this TP group. Collective over the world at its first call with a value."""
        if tp_ranks not in self._subgroups:
            mine = None
            for dp_rank in range(self.dp_size):
                ranks = tuple(dp_rank * self.tp_size + r for r in tp_ranks)
                pg = self.tp.pg if len(ranks) == self.tp_size else _new_group(ranks)
                if dp_rank == self.dp.rank and self.tp.rank in tp_ranks:
                    mine = Group("tp" if len(ranks) == self.tp_size else "replicas", ranks, pg)
            self._subgroups[tp_ranks] = mine or Group("elsewhere", (dist.get_rank(),), None)
        return self._subgroups[tp_ranks]


_mesh: Mesh | None = None
_alone: dist.ProcessGroup | None = None


def init_mesh(tp_size: int) -> Mesh:
    """Build the groups (collective over the world), or return the existing mesh of the same ``tp_size``.

    Raises:
        TPError: torch.distributed is not initialised, ``tp_size`` does not divide the world, or another mesh exists.
    """
    global _mesh, meetings
    if not dist.is_initialized():
        raise TPError(
            f"tp_size={tp_size} needs an initialised torch.distributed with a multiple of {tp_size} processes; start "
            "the script with `accelerate launch` or `torchrun`"
        )
    if _mesh is not None and _mesh_is_alive(_mesh):
        if _mesh.tp_size != tp_size:
            raise TPError(
                f"tp_size={tp_size} was asked for, but this run already has tp_size={_mesh.tp_size}; all models of a "
                "run share one tp_size"
            )
        return _mesh
    world = dist.get_world_size()
    if tp_size < 1 or world % tp_size:
        raise TPError(
            f"tp_size={tp_size} does not divide the world of {world} processes (num_processes); write num_processes = "
            f"tp_size x data-parallel size, for example {tp_size * max(1, round(world / max(tp_size, 1)))}"
        )
    dp_size = world // tp_size
    me = dist.get_rank()
    tp = _mine([tuple(range(d * tp_size, (d + 1) * tp_size)) for d in range(dp_size)], "tp", me)
    dp = _mine([tuple(range(t, world, tp_size)) for t in range(tp_size)], "dp", me)
    control = _mine([tuple(range(d * tp_size, (d + 1) * tp_size)) for d in range(dp_size)], "control", me, "gloo")
    everyone = Group("world", tuple(range(world)), dist.group.WORLD)
    _mesh = Mesh(tp_size, dp_size, tp, dp, control, everyone)
    meetings = 0  # whatever the ranks did in groups that are no more
    return _mesh


def alone() -> dist.ProcessGroup:
    """A process group of this rank only, for libraries that take None for the world. Collective at its first call."""
    global _alone
    if _alone is None or _alone not in dist.distributed_c10d._world.pg_map:
        for rank in range(dist.get_world_size()):
            pg = _new_group((rank,))
            _alone = pg if rank == dist.get_rank() else _alone
    assert _alone is not None
    return _alone


def current_mesh() -> Mesh | None:
    """The mesh of this process, or None before :func:`init_mesh`."""
    return _mesh


def require_mesh() -> Mesh:
    """The mesh of this process."""
    if _mesh is None:
        raise TPError("no tensor-parallel mesh in this process yet; call tp_plugin.parallelize or init_mesh first")
    return _mesh


def _named(name: str) -> Group:
    group: Group = getattr(require_mesh(), name)
    return group


traced_ops.implement(
    all_reduce=lambda name, x: _named(name).summed(x),
    all_gather=lambda name, x: torch.stack(_named(name).all_gather(x)),
    reduce_scatter=lambda name, parts: _named(name).reduce_scatter(parts),
)


def forget_mesh() -> None:
    """Drop the mesh and end its process groups, whose threads would stay. Collective over the world."""
    global _mesh
    if _mesh is not None:
        for close in _mesh.at_end:
            close()
    if _mesh is not None and dist.is_initialized() and _mesh_is_alive(_mesh):
        groups = (_mesh.tp, _mesh.dp, _mesh.control, *_mesh._subgroups.values())
        for pg in {id(group.pg): group.pg for group in groups}.values():
            if pg is not None and pg in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(pg)
    _mesh = None


def _mesh_is_alive(mesh: Mesh) -> bool:
    # after destroy_process_group and a new init the old groups are unknown to torch.distributed
    return mesh.world.pg is dist.group.WORLD


def _mine(all_ranks: list[tuple[int, ...]], name: str, me: int, backend: str | None = None) -> Group:
    mine = None
    for ranks in all_ranks:
        pg = _new_group(ranks, backend) if len(ranks) > 1 else None
        if me in ranks:
            mine = Group(name, ranks, pg)
    assert mine is not None
    return mine


def _new_group(ranks: tuple[int, ...], backend: str | None = None) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend=backend, timeout=_default_timeout())
    return group


def _default_timeout() -> datetime.timedelta | None:
    # new_group falls back to 30 minutes, not to the timeout the script gave to init_process_group
    pg: Any = dist.group.WORLD
    for device in ("cpu", "cuda"):
        try:
            timeout: datetime.timedelta = pg._get_backend(torch.device(device)).options._timeout
            return timeout
        except (RuntimeError, AttributeError):
            continue  # this world has no backend for that device
    return None
