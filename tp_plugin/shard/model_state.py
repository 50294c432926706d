"""What is known of one sharded model: its plan, its parameters, and how other ranks read them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import weakref
import zlib
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from tp_plugin.mesh.dtensor_utils import held
from tp_plugin.mesh.host_copy import HostCopy
from tp_plugin.policy import ParamLayout, Plan
from tp_plugin.runtime.batch_guard import Sample
from tp_plugin.runtime.published import ELSEWHERE
from tp_plugin.runtime.runtime import Runtime
from tp_plugin.shard.copies import Copies
from tp_plugin.shard.lazy_full_tensor import LazyFullTensor
from tp_plugin.shard.model_peers import ModelPeers
from tp_plugin.shard.params import ParamIndex
from tp_plugin.shard.quantized import cut_statistics
from tp_plugin.tensor.on_shards import on_shards

_numbers = itertools.count()

SAMPLED, SAMPLES = 64, 16
"""Replicated parameters of which elements are compared before a read, and how many of each."""

DRIFT = 1e-5
"""Relative difference up to which these are equal: replicas may be some rounding apart, and the leader's count."""


class Clock(NamedTuple):
    """When in the program a rank's weights are: in-place updates, optimizer steps, samples of replicated ones."""

    moved: int
    steps: int
    sample: list[float]


def _agree(mine: list[float], theirs: list[float]) -> bool:
    return len(mine) == len(theirs) and all(
        a == b or abs(a - b) <= DRIFT * max(abs(a), abs(b)) or not (math.isfinite(a) or math.isfinite(b))
        for a, b in zip(mine, theirs, strict=True)
    )


class ModelState:
    """Lives on the sharded model as ``model.tp_record``; copied with it, as the state of the copy.

    Attributes:
        number: equal on all ranks: every rank shards and copies its models in the same order.
        uid: the name by which other ranks read the model's tensors.
        index: its parameters.
        copies: whole weights that were given to the script.
        attached: whether the parameters carry their entries and hooks; those of a copy do from its first forward on.
        steps: steps taken by an engine that has an optimizer of its own (DeepSpeed).
        model: weak reference to the model.
        wrapper: weak reference to what the model was given in; one state watches what is in no sharded model.
    """

    def __init__(self, model: nn.Module, plan: Plan, runtime: Runtime, layouts: dict[str, ParamLayout]):
        self.plan, self.runtime, self.mesh = plan, runtime, runtime.mesh
        self.attached = True
        # a copy, which is empty when its state is made, has those of the original
        self._register(model, {**layouts, **{name: layout for name, _, layout in cut_statistics(model)}})
        for name, parameter in model.named_parameters():
            size = parameter.element_size()
            runtime.held_bytes += parameter.numel() * size
            runtime.full_bytes += torch.Size(plan.layouts[name].shape).numel() * size
        for _, tensor, layout in cut_statistics(model):
            runtime.held_bytes += tensor.nbytes
            runtime.full_bytes += torch.Size(layout.shape).numel() * tensor.element_size()

    def _register(self, model: nn.Module, layouts: dict[str, ParamLayout]) -> None:
        self.number = next(_numbers)
        self.uid = f"model{self.number}"
        self.model = weakref.ref(model)
        self.wrapper: Callable[[], nn.Module | None] = lambda: None
        self.steps: Callable[[], int] = lambda: self.runtime.progress.optimizer_steps
        self.index = ParamIndex(model, layouts)
        self.copies = Copies()
        self.peers = ModelPeers(self.runtime, self.number, self.read_whole)
        self._full: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = weakref.WeakValueDictionary()
        self._lazy: weakref.WeakValueDictionary[str, LazyFullTensor] = weakref.WeakValueDictionary()
        self._versions: dict[str, int] = {}
        self._shadow: nn.Module = nn.Module()
        self.runtime.published.publish(self.uid, self)
        self.runtime.models.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        original = self.model()
        copied_model = memo.get(id(original))
        if copied_model is None:
            return self  # only a part of the model is copied: it goes on reading the original's state
        copied = object.__new__(ModelState)
        copied.plan, copied.runtime, copied.mesh = self.plan, self.runtime, self.mesh
        copied.attached = False  # copied Parameters lose their hooks; the first forward puts them back
        copied._register(copied_model, self.index.layouts)
        return copied

    def __reduce__(self) -> str:
        raise TypeError(
            "a tensor-parallel model cannot be pickled whole (it holds process groups); save model.state_dict(), or "
            "use save_pretrained"
        )

    def retain(self) -> None:
        """Hold what the model is made of (a copied model is still empty when its state is made), but not the model."""
        model = self.model()
        if model is None:
            return
        self.index.tensors()
        shadow = object.__new__(type(model))
        shadow.__dict__ = {
            name: MethodType(value.__func__, shadow) if getattr(value, "__self__", None) is model else value
            for name, value in vars(model).items()
        }
        self._shadow = shadow

    def module(self) -> nn.Module:
        """The model; once the script has let go of it, a module made of the same parts."""
        return self.model() or self._shadow

    def alive(self) -> bool:
        """Whether the script still holds the model."""
        return self.model() is not None

    def attach(self) -> None:
        """Bind the parameters to what is known of them. Collective."""
        self.index.attach(self.plan, self.mesh, self.peers, self.runtime.replica_sums)

    def reattach(self) -> None:
        """Give the parameters of a copied model their entries and hooks, once."""
        if not self.attached:
            self.attached = True
            self.attach()

    @on_shards
    def check(self) -> None:
        """See :meth:`ParamIndex.check` and :meth:`Copies.check`; a copied model's entries are attached later."""
        self.copies.check()
        if self.attached and self.alive():
            self.index.check(self.mesh.unit.rank)

    def follow_renames(self) -> None:
        """Follow modules that moved in the model since its tensors were last listed (PEFT unloads adapters)."""
        model = self.model()
        assert model is not None
        self.index.rename()
        for path, module in model.named_modules():
            hooks: Any = getattr(module, "tp_state_hooks", None)
            if hooks is not None:
                hooks.path = path
        self.start_counting()

    @on_shards
    def start_counting(self) -> None:
        """Take the parameters' present versions as zero: ranks may have come here by different in-place copies."""
        self._versions = {name: p._version for name, p in self.index.tensors().items()}

    @on_shards
    def clock(self) -> Clock:
        """When in the program this rank's weights are."""
        if self.mesh.pp_size > 1:  # stages hold different parameters, of which DDP and optimizers skip the empty ones
            return Clock(self.runtime.region.writes, self.steps(), [])
        moved = sum(p._version - self._versions.get(name, 0) for name, p in self.index.tensors().items())
        return Clock(moved, self.steps(), self._sample())

    def is_at(self, theirs: Clock) -> bool:
        """Whether this rank's weights are of the same step as those of a rank whose clock is ``theirs``."""
        mine = self.clock()
        return mine[:2] == theirs[:2] and _agree(mine.sample, theirs.sample)

    def explain_mismatch(self, theirs: Clock) -> str:
        """Why a rank whose clock is ``theirs`` cannot read here."""
        if self.clock()[:2] == theirs[:2]:
            return (
                "its replicated parameters hold other values after as many updates: they were changed on one rank "
                "alone, or have drifted apart (`tp_plugin: {audit_every: 1}` says when and which)"
            )
        return ELSEWHERE

    def _chosen(self, ranks: Sequence[int]) -> torch.Tensor | None:
        """Some elements of what ``ranks`` of the unit hold alike; a write to ``.data`` leaves no other sign."""
        chosen: list[torch.Tensor] = []
        if len(ranks) == 1 or self.mesh.unit.rank not in ranks:
            return None
        for name, parameter in self.index.tensors().items():
            flat = held(parameter.detach()).reshape(-1)
            if chosen and flat.device != chosen[0].device:  # a part that is offloaded
                continue
            if self.index.layouts[name].is_alike_on(ranks) and flat.numel() and len(chosen) < SAMPLED:
                chosen.append(flat[:: -(-flat.numel() // SAMPLES)].float())
        return torch.cat(chosen) if chosen else None

    def _sample(self) -> list[float]:
        chosen = self._chosen(range(self.mesh.unit.size))
        return [] if chosen is None else self.runtime.progress.to_host(chosen).tolist()

    @on_shards
    def sample(self) -> Sample:
        """Some elements of weights that other ranks have, too, as they are now, for the thread that trains."""
        stage, ends = (self._chosen(ranks) for ranks in self.mesh.alike)
        return None if stage is None else HostCopy(stage), None if ends is None else HostCopy(ends)

    @on_shards
    def local(self, key: str) -> torch.Tensor:
        """This rank's tensor named ``key`` (a parameter's first name in the model)."""
        # an alias: another thread asks, and this one may leave a step meanwhile, in which the parameter looks whole
        return self.index.tensors()[key].detach()

    @on_shards
    def read_whole(self, name: str) -> torch.Tensor:
        """The whole parameter in host memory, of ranks that are elsewhere; they wait at a sync point."""
        return read_full_tensor(self.runtime, self.uid, name, self.local(name), self.index.layouts[name])

    def full_tensor(self, key: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of a sharded parameter, in host memory; the same object for tied names."""
        layout = self.index.layouts[key]
        if not layout.is_sharded:
            return local
        name = self.index.first_name(key)
        at = (name, self.runtime.sync_points.clock, local._version, self.steps())
        full = self._full.get(at)
        if full is None:
            full = read_full_tensor(self.runtime, self.uid, name, local, layout)
            self._full[at] = self.copies.give(key, full)
        return full

    def lazy_full_tensor(self, key: str, local: torch.Tensor) -> torch.Tensor:
        """The full tensor of a sharded parameter, read when it is used; the same object for tied names."""
        layout = self.index.layouts[key]
        if not layout.is_sharded:
            return local
        name = self.index.first_name(key)
        lazy = self._lazy.get(name)
        if lazy is None:
            read = functools.partial(read_full_tensor, self.runtime, self.uid, name, local, layout)
            lazy = self._lazy[name] = LazyFullTensor.of(layout.shape, local.dtype, read)
        return lazy


@on_shards
def read_full_tensor(runtime: Runtime, uid: str, key: str, local: torch.Tensor, layout: ParamLayout) -> torch.Tensor:
    """Assemble a full tensor in host memory, by one collective if all ranks came, else one peer's shard at a time."""
    runtime.sessions.progressed()
    shards = runtime.joint_reads.read(uid, key, local, layout)
    full = torch.empty(layout.shape, dtype=local.dtype, device="cpu")
    if shards is not None:
        while shards:  # each goes as it is placed, and the pages of the full tensor come: never both at once
            shard = shards.pop()
            layout.place(full, shard, len(shards))
            del shard
        return full
    me = runtime.mesh.unit.rank
    layout.place(full, local.detach().cpu(), me)
    for rank in range(layout.ranks):
        if rank != me:
            layout.place(full, runtime.published.read(uid, key, rank), rank)
    return full


def checksum(tensor: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of the bytes of what this rank holds of a tensor, continuing from ``start``."""
    mine = held(tensor.detach()).cpu().contiguous()
    size = mine.numel() * mine.element_size()
    # not numpy(), after which the storage cannot be resized, as FSDP2 resizes those that it frees
    return zlib.crc32((ctypes.c_ubyte * size).from_address(mine.data_ptr()), start) if size else start
