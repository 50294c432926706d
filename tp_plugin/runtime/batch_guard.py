"""Before each top-level forward: are the ranks of the TP group still one process?

One all-gather of 80 bytes over ``unit_cpu`` compares the call, the batch, the generators, the loss at which the last
backward began and, at some forwards, a sample of the replicated weights. Another batch or another loss is an error on
every rank; where the sample differs, the audit says what has drifted; unequal generators are set to those of the
leader, as the group is one process and has one.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.errors import DivergenceError, TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.last_loss import LastLoss
from tp_plugin.runtime.progress import Progress
from tp_plugin.runtime.sync_points import FORWARD, GRADIENTS, Request, SyncPoints
from tp_plugin.tensor import rng
from tp_plugin.tensor.global_view import ScriptRegion

_SAMPLE = 1 << 16
"""Elements of a device tensor that are copied to the host for hashing; larger ones are sampled and summed."""

SAME = 1e-6
"""Relative difference up to which losses are one number. Equal weights give equal bits, so this is lenient."""

ROUNDED = 1e-4
"""The same where rounding has drifted into the replicated weights: kernels that add in any order, for months."""

SAMPLED = 16
"""Training forwards between two looks at the parameters; there are looks at the 2nd, 4th and 8th, too."""

SMALL = 1e-2
"""Losses smaller than this are compared as if they were of this size: they may be differences of larger numbers."""


class Parts(Protocol):
    """What the guard needs of the Runtime."""

    mesh: Mesh
    sync_points: SyncPoints
    progress: Progress
    last_loss: LastLoss
    region: ScriptRegion


class BatchGuard:
    """Watches the forwards of one sharded model.

    Args:
        sample: a number computed of replicated weights; equal on all ranks that hold the same.
        audit: says which replicated weights have drifted apart, collectively; runs where samples differ, and every
            ``audit_every`` training forwards.
        check: raises if the parameters are not those that were sharded; called at a look, and where some module of the
            process got a parameter since.
        rounded: whether replicated weights differ over the TP group, but by no more than rounding. Collective.
    """

    def __init__(
        self,
        runtime: Parts,
        audit: Callable[[], None] | None = None,
        audit_every: int = 0,
        sample: Callable[[], float] = lambda: math.nan,
        check: Callable[[], None] = lambda: None,
        rounded: Callable[[], bool] = lambda: False,
    ):
        self._runtime, self.mesh, self.sync_points = runtime, runtime.mesh, runtime.sync_points
        self.audit, self.audit_every, self.sample, self.check, self.rounded = audit, audit_every, sample, check, rounded
        self._registered = -1
        self.training_forwards = 0
        self._depth = self._entered = 0
        self._outermost: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchGuard:
        return BatchGuard(self._runtime)  # a copy is another model: no audit of the original's parameters

    @torch._dynamo.disable
    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook (with kwargs) of a model; checks at the outermost call only. Never in a graph."""
        self._runtime.region.enter_forward()
        self._entered += 1
        if self._registered != self._runtime.progress.registered or self._looks(module):
            self.check()
            self._registered = self._runtime.progress.registered
        self._depth += 1
        self.sync_points.depth += 1
        if self._depth > 1 or self.sync_points.helping:
            return
        self._outermost = module
        _refuse_learned_masks(kwargs)
        training = module.training and torch.is_grad_enabled()
        self.mesh.context.stats.in_training = training
        self._check(module, args, kwargs)
        if training:
            self.training_forwards += 1
            self._runtime.progress.training_forwards += 1
            if self.audit and self.audit_every and self.training_forwards % self.audit_every == 0:
                self.audit()

    @torch._dynamo.disable
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

    def open_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """:meth:`open` for the model in a model; part of the outer one's graph, which has been opened."""
        if not (torch.compiler.is_compiling() and self._outermost is not None):
            self.open(module, args, kwargs)

    def close_inner(self, module: nn.Module, args: Any, output: Any) -> None:
        """:meth:`close` for the model in a model."""
        if not torch.compiler.is_compiling() or self._outermost is module:
            self.close(module, args, output)

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = digests(args, kwargs)
        batch = zlib.crc32(repr(sorted(seen.items())).encode())
        mode = GRADIENTS * torch.is_grad_enabled() + 2 * module.training
        record: Any = getattr(module, "tp_record", None)  # an inner model called by itself has none
        rounding = self._runtime.last_loss.rounding
        loss, sample = self._runtime.last_loss.take(), self.sample() if self._looks(module) else math.nan
        mine = [mode, record.number if record else -1, batch, rng.fingerprint(), _bits(loss), _bits(sample)]
        everyone = self.sync_points.rendezvous(
            FORWARD, mine, lambda: record and Request.of("__call__", module, args, kwargs)
        )
        self.sync_points.leader_alone = len(everyone) < self.mesh.unit.size
        if any(values[:3] != mine[:3] for values in everyone):
            self._depth, self._outermost = 0, None
            self._explain(module, seen, mode)
        self._compare_losses([_number(values[4]) for values in everyone], rounding)
        self._compare_samples([_number(values[5]) for values in everyone])
        if any(values[3] != mine[3] for values in everyone):
            rng.synchronize(self.mesh.unit_cpu)

    def _compare_losses(self, losses: list[float], rounding: float) -> None:
        if not all(map(math.isfinite, losses)):
            return
        apart = (max(losses) - min(losses)) / max(SMALL, *map(abs, losses))
        if apart <= SAME or (apart <= max(ROUNDED, 2 * rounding) and self.rounded()):
            return
        self._depth, self._outermost = 0, None
        seen = ", ".join(f"rank {rank}: {loss:.9g}" for rank, loss in zip(self.mesh.unit.ranks, losses, strict=True))
        raise DivergenceError(
            f"the ranks of a TP group called backward() on different losses ({seen}), which must be one number. "
            "Something in the loss is drawn or looked up by each rank for itself, or comes from weights inside of a "
            "forward, where a rank has its shard (a penalty that a module of the model computes). Compute penalties in "
            "the script, where weights look whole, and use values that accelerator.gather or broadcast has made equal"
        )

    def _looks(self, module: nn.Module) -> bool:
        if not self._runtime.progress.looks_for_drift:
            return False
        count = self.training_forwards + 1
        return module.training and torch.is_grad_enabled() and (count % SAMPLED == 0 or count in (2, 4, 8))

    def _compare_samples(self, samples: list[float]) -> None:
        if not all(map(math.isfinite, samples)) or max(samples) - min(samples) <= SAME * max(map(abs, samples)):
            return
        if self.audit:
            self.audit()  # which raises, unless it takes the difference for rounding

    def _explain(self, module: nn.Module, mine: dict[str, Any], mode: int) -> None:
        phase = f"{'training' if mode & 2 else 'evaluation'}, gradients {'on' if mode & GRADIENTS else 'off'}"
        call = f"{type(module).__name__} ({phase})"
        theirs = self.mesh.unit_cpu.gather_objects((call, mine))
        where = f"forward {self.sync_points.clock}, TP group of ranks {list(self.mesh.unit.ranks)}"
        calls = {rank: call for rank, (call, _) in zip(self.mesh.unit.ranks, theirs, strict=True)}
        if len(set(calls.values())) > 1:
            raise DivergenceError(f"{where}: the ranks are at different places of the script: {calls}")
        names = sorted({name for _, digest in theirs for name in digest})
        name = next((n for n in names if len({repr(digest.get(n)) for _, digest in theirs}) > 1), "?")
        digests_of = zip(self.mesh.unit.ranks, theirs, strict=True)
        seen = ", ".join(f"rank {rank}: {_show(digest.get(name))}" for rank, (_, digest) in digests_of)
        raise DivergenceError(
            f"{where}: the ranks are about to compute on different batches; {name!r} differs ({seen}). Ranks of a TP "
            "group are one process and must see one batch: pass the loader through accelerator.prepare, or shard the "
            "data by accelerator.process_index / num_processes instead of RANK or LOCAL_RANK"
        )


def _bits(number: float) -> int:
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found


def _number(bits: int) -> float:
    found: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return found


def _refuse_learned_masks(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if "mask" in name and isinstance(value, torch.Tensor) and value.requires_grad:
            raise TPError(
                f"{name!r} requires a gradient, of which each rank of a TP group would compute only the part of its "
                "attention heads; pass it with .detach(), or set tp_size: 1"
            )


def digests(args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, dtype and checksum of every tensor among the arguments of a call, by name."""
    return {name: digest(tensor) for name, tensor in _tensors(args, kwargs).items()}


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}" if name else str(key), item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}[{index}]", item)

    walk("args", args)
    # a cache holds each rank's own heads
    walk("", {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache_params")})
    return found


def digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and checksum; of a large tensor on a device, that of its sum and a sample."""
    data = tensor.detach()
    total = 0.0
    if data.device.type != "cpu" and data.numel() > _SAMPLE:
        total = data.sum(dtype=torch.float64 if data.is_floating_point() else torch.int64).item()
        data = data.reshape(-1)[:: data.numel() // _SAMPLE]
    raw = data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), str(tensor.dtype), zlib.crc32(raw.data, zlib.crc32(repr(total).encode()))


def _show(digest: tuple[tuple[int, ...], str, int] | None) -> str:
    if digest is None:
        return "absent"
    shape, dtype, checksum = digest
    return f"{dtype} {list(shape)} checksum {checksum:08x}"
