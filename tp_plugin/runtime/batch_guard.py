"""Before each top-level forward: are the ranks of the TP group still one process?

One all-gather of 96 bytes over ``unit_cpu`` compares the call, the batch, the generators, the loss at which the last
backward began and, at some forwards, samples of the weights that ranks have in common. Another batch or
another loss is an error on every rank; where samples differ, the audit says what has drifted; unequal generators are
set to those of the leader, as the group is one process and has one.

The host waits for no device here. Of what lies on one, a batch that the leader sent is known by its number; other
tensors, the loss and the sample are compared at the next meeting.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.errors import DivergenceError, TPError
from tp_plugin.mesh.host_copy import HostCopy
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.digests import LateDigest, Vouched, difference, digests, tensors_of
from tp_plugin.runtime.last_micro_batch import OTHER_BATCHES, SAME, LastMicroBatch, bits, number
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.sync_points import FORWARD, GRADIENTS, Request, SyncPoints
from tp_plugin.tensor import rng
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.graphs import disable

SAMPLED = 16
"""Training forwards between two looks at the parameters; there are looks at the 2nd, 4th and 8th, too."""


Sample = tuple[HostCopy | None, HostCopy | None]
"""Some elements of what the ranks of this stage hold alike, and of what the first and the last stage do."""


class Parts(Protocol):
    """What the guard needs of the Runtime."""

    mesh: Mesh
    sync_points: SyncPoints
    progress: Progress
    last_micro_batch: LastMicroBatch
    vouched: Vouched
    region: ScriptRegion


class BatchGuard:
    """Watches the forwards of one sharded model.

    Args:
        sample: some elements of replicated weights; equal on all ranks that hold the same (:attr:`Mesh.alike`).
        audit: says which replicated weights have drifted apart, collectively; runs where samples differ, and every
            ``audit_every`` training forwards.
        check: raises if the parameters are not those that were sharded; called at a look, and where some module of the
            process got a parameter since.
        rounded: whether replicated weights differ over the TP group, but by no more than rounding. Collective.
        every: compare batches and losses at every so many forwards; 0: neither them nor the sample.
    """

    def __init__(
        self,
        runtime: Parts,
        audit: Callable[[], None] | None = None,
        audit_every: int = 0,
        sample: Callable[[], Sample] = lambda: (None, None),
        check: Callable[[], None] = lambda: None,
        rounded: Callable[[], bool] = lambda: False,
        every: int = 1,
    ):
        self._runtime, self.mesh, self.sync_points = runtime, runtime.mesh, runtime.sync_points
        self.audit, self.audit_every, self.sample, self.check, self.rounded = audit, audit_every, sample, check, rounded
        self._every, self._meetings = every, 0
        self._sample: Sample = (None, None)
        self._registered = -1
        self.training_forwards = 0
        self._depth = self._entered = 0
        self._outermost: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchGuard:
        # a copy is another model: no audit of the original's parameters
        return BatchGuard(self._runtime, every=self._every)

    @disable
    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook (with kwargs) of a model; checks at the outermost call only. Never in a graph."""
        self._runtime.region.enter_forward()
        self._entered += 1
        if not self._depth and (self._registered != self._runtime.progress.registered or self._looks(module)):
            self.check()
            self._registered = self._runtime.progress.registered
        self._depth += 1
        self.sync_points.depth += 1
        if self._depth > 1 or self.sync_points.helping:
            return
        self._outermost = module
        waiting = self.mesh.context.waiting
        waiting.called_at = waiting.script_line()
        _refuse_learned_masks(kwargs)
        training = module.training and torch.is_grad_enabled()
        self.mesh.context.stats.in_training = training
        try:
            self._check(module, args, kwargs)
        except DivergenceError:
            self._depth, self._outermost = 0, None
            raise
        if training:
            self.training_forwards += 1
            self._runtime.progress.training_forwards += 1
            if (first := self._runtime.progress.first_step) is not None:
                first.forward((*args, *kwargs.values()))
            if (report := self._runtime.progress.memory_report) is not None:
                report.forward(module, args, kwargs)
            if self.audit and self.audit_every and self.training_forwards % self.audit_every == 0:
                self.audit()

    @disable
    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook (always called) that closes what :meth:`open` opened."""
        if self._entered:
            self._entered -= 1
            self._runtime.region.leave()
        self._depth = max(0, self._depth - 1)
        self.sync_points.depth = max(0, self.sync_points.depth - 1)
        if not self._depth:
            self._outermost = None
            self.sync_points.leader_alone = False
            self.mesh.context.waiting.called_at = ""

    def open_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """:meth:`open` for the model in a model; part of the outer one's graph, which has been opened."""
        if not (torch.compiler.is_compiling() and self._outermost is not None):
            self.open(module, args, kwargs)

    def close_inner(self, module: nn.Module, args: Any, output: Any) -> None:
        """:meth:`close` for the model in a model."""
        if not torch.compiler.is_compiling() or self._outermost is module:
            self.close(module, args, output)

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_due = self._every > 0 and self._meetings % self._every == 0
        seen, late = self._inputs(args, kwargs) if is_due else ({}, {})
        batch = zlib.crc32(repr(sorted(seen.items())).encode())
        mode = GRADIENTS * torch.is_grad_enabled() + 2 * module.training
        record: Any = getattr(module, "tp_record", None)  # an inner model called by itself has none
        looked, self._sample = self._sample, (None, None)
        if self._every and self._looks(module):
            self._sample = self.sample()
            if not any(one is not None and one.is_late for one in self._sample):
                looked, self._sample = self._sample, (None, None)
        mine = [
            mode,
            record.number if record else -1,
            batch,
            rng.fingerprint(),
            *(bits(_number(one)) for one in looked),
        ]
        everyone = self.sync_points.rendezvous(
            FORWARD, mine, lambda: record and Request.of("__call__", module, args, kwargs), self.rounded
        )
        self.sync_points.leader_alone = len(everyone) < self.mesh.unit.size
        if self.sync_points.leader_alone:
            self._sample = looked  # a forward without gradients, and without the peers
            return
        self._meetings += 1
        if any(values[:3] != mine[:3] for values in everyone):
            self._explain(module, args, kwargs, mode)
            late = {}
        where = f"forward {self.sync_points.clock}, TP group of ranks {list(self.mesh.unit.ranks)}"
        self._runtime.last_micro_batch.begins(where, late, watched=is_due)
        self._compare_samples([number(values[4]) for values in everyone], [number(values[5]) for values in everyone])
        if any(values[3] != mine[3] for values in everyone):
            rng.synchronize(self.mesh.unit_cpu)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, LateDigest]]:
        """What is known of each input now, and of whom more is known later."""
        seen: dict[str, Any] = {}
        late: dict[str, LateDigest] = {}
        for name, tensor in tensors_of(args, kwargs).items():
            stamp = self._runtime.vouched.stamp(tensor)
            if stamp is not None:
                seen[name] = stamp
                continue
            digest = LateDigest(tensor)
            if digest.is_late:
                late[name] = digest
            seen[name] = (digest.shape, digest.dtype) if digest.is_late else digest.value()
        return seen, late

    def _looks(self, module: nn.Module) -> bool:
        if not self._runtime.progress.looks_for_drift:
            return False
        count = self.training_forwards + 1
        return module.training and torch.is_grad_enabled() and (count % SAMPLED == 0 or count in (2, 4, 8))

    def _compare_samples(self, of_stages: list[float], of_ends: list[float]) -> None:
        tp = self.mesh.tp_size
        groups = [of_stages[at : at + tp] for at in range(0, len(of_stages), tp)]
        groups += [[first, last] for first, last in zip(of_ends[:tp], of_ends[-tp:], strict=True)]
        if self.audit and not all(map(_are_one, groups)):
            self.audit()  # which raises, unless it takes the difference for rounding

    def _explain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: int) -> None:
        """Raise what differs; nothing does if the leader's tensors are known by number on some ranks only."""
        phase = f"{'training' if mode & 2 else 'evaluation'}, gradients {'on' if mode & GRADIENTS else 'off'}"
        record: Any = getattr(module, "tp_record", None)
        call = f"{type(module).__name__}{'' if record is None else f' {record.number}'} ({phase})"
        theirs = self.mesh.unit_cpu.gather_objects((call, digests(args, kwargs)))
        where = f"forward {self.sync_points.clock}, TP group of ranks {list(self.mesh.unit.ranks)}"
        calls = {rank: call for rank, (call, _) in zip(self.mesh.unit.ranks, theirs, strict=True)}
        if len(set(calls.values())) > 1:
            raise DivergenceError(f"{where}: the ranks are at different places of the script: {calls}")
        found = difference(self.mesh.unit.ranks, [digests for _, digests in theirs])
        if found is not None:
            raise DivergenceError(
                f"{where}: the ranks are about to compute on different batches; {found[0]!r} differs ({found[1]}). "
                f"{OTHER_BATCHES}"
            )


def _are_one(samples: list[float]) -> bool:
    return not all(map(math.isfinite, samples)) or max(samples) - min(samples) <= SAME * max(map(abs, samples))


def _number(sample: HostCopy | None) -> float:
    """A number of some elements, each with a weight of its own."""
    if sample is None:
        return math.nan
    return math.fsum(value * (1 + at % 7) for at, value in enumerate(sample.value().tolist()))


def _refuse_learned_masks(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if "mask" in name and isinstance(value, torch.Tensor) and value.requires_grad:
            raise TPError(
                f"{name!r} requires a gradient, of which each rank of a TP group would compute only the part of its "
                "attention heads; pass it with .detach(), or set tp_size: 1"
            )
