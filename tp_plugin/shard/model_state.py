"""What is known of one sharded model: its plan, and how other ranks read its local tensors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.dtensor_utils import held, joined
from tp_plugin.mesh.groups import Mesh
from tp_plugin.policy import ParamLayout, Plan
from tp_plugin.runtime.transport import ELSEWHERE, PeerTransport
from tp_plugin.shard.full_tensor import plain_name
from tp_plugin.shard.lazy_full_tensor import LazyFullTensor

_uids = itertools.count()
_FINGERPRINTED = 64
"""Replicated parameters whose content enters a fingerprint."""


class ShardRecord:
    """Lives on the sharded model as ``model.tp_record``; copied with it, as the record of the copy."""

    def __init__(self, model: nn.Module, plan: Plan, mesh: Mesh, exchange: PeerTransport):
        self.plan, self.mesh, self.exchange = plan, mesh, exchange
        self.armed = True
        self.progress: Callable[[], int] = int
        """Steps taken by an engine that updates parameters behind their back (in flat buffers)."""
        self._settle(model)
        for name, parameter in model.named_parameters():
            size = parameter.element_size()
            _totals["parameter_bytes"] += parameter.numel() * size
            _totals["whole_parameter_bytes"] += torch.Size(plan.layouts[name].shape).numel() * size

    def _settle(self, model: nn.Module) -> None:
        # every rank shards and copies its models in the same order, so counting names them alike
        number = next(_uids)
        self.number = number
        self.uid = f"model{number}"
        self.model = weakref.ref(model)
        self.wrapper: Callable[[], nn.Module | None] = lambda: None
        """What the model was given in, of which one record watches what is in no sharded model."""
        self._wholes: weakref.WeakValueDictionary[tuple[str, int, int], torch.Tensor] = weakref.WeakValueDictionary()
        self._promises: weakref.WeakValueDictionary[str, LazyFullTensor] = weakref.WeakValueDictionary()
        self._versions: dict[str, int] = {}
        self._parameters: dict[str, torch.Tensor] = {}
        self._shadow: nn.Module = nn.Module()
        self.exchange.publish(self.uid, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardRecord:
        original = self.model()
        copied_model = memo.get(id(original))
        if copied_model is None:
            return self  # only a part of the model is copied: it goes on reading the original's record
        copied = ShardRecord.__new__(ShardRecord)
        copied.plan, copied.mesh, copied.exchange = self.plan, self.mesh, self.exchange
        copied.progress = int
        copied.armed = False  # copied Parameters lose their hooks; the first forward puts them back
        copied._settle(copied_model)
        return copied

    def __reduce__(self) -> str:
        raise TypeError(
            "a tensor-parallel model cannot be pickled whole (it holds process groups); save model.state_dict(), or "
            "use save_pretrained"
        )

    def keep(self) -> None:
        """Hold what the model is made of (a copied model is still empty when its record is made), but not the model."""
        model = self.model()
        if model is None:
            return
        if not self._parameters:
            self.parameters()
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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Local tensors by name, tied ones once; they outlive the model for as long as a peer may read them."""
        model = self.model()
        if model is not None:
            self._parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        return self._parameters

    def _beside(self) -> dict[str, torch.Tensor]:
        """Trained parameters of the wrapper that are in none of its sharded models: whole, and equal on all ranks."""
        wrapper = self.wrapper()
        if wrapper is None:
            return {}
        sharded = [module for module in wrapper.modules() if getattr(module, "tp_record", None) is not None]
        inside = {id(parameter) for module in sharded for parameter in module.parameters()}
        named = wrapper.named_parameters()
        return {plain_name(name): p for name, p in named if p.requires_grad and id(p) not in inside}

    def rename(self) -> None:
        """Follow modules that moved in the model since :meth:`parameters` was last called (PEFT unloads adapters)."""
        model = self.model()
        assert model is not None
        known = {id(parameter): self.plan.layouts[name] for name, parameter in self._parameters.items()}
        names = dict(model.named_parameters(remove_duplicate=False))
        # a copy of the model keeps the old plan
        self.plan = dataclasses.replace(self.plan, layouts={name: known[id(p)] for name, p in names.items()})
        for path, module in model.named_modules():
            owner: Any = getattr(module, "tp_owner", None)
            if owner is not None:
                owner.path = path
        self.start_counting()

    def start_counting(self) -> None:
        """Take the parameters' present versions as zero: ranks may have come here by different in-place copies."""
        self._versions = {name: p._version for name, p in self.parameters().items()}

    def fingerprint(self) -> tuple[object, ...]:
        """Equal on two ranks when all parameters saw as many in-place updates and replicated ones are equal."""
        moved, content, counted = 0, 0, 0
        for name, parameter in self.parameters().items():
            moved += parameter._version - self._versions.get(name, 0)
            if not self.plan.layouts[name].is_sharded and counted < _FINGERPRINTED:
                counted += 1
                content = checksum(parameter, content)
        return moved, content, self.progress()

    def apart(self, theirs: object) -> str:
        """Why a rank whose fingerprint is ``theirs`` cannot read here."""
        moved, _, progress = self.fingerprint()
        if isinstance(theirs, tuple) and (moved, progress) == (theirs[0], theirs[2]):
            return (
                "its replicated parameters hold other values after as many updates: they were changed on one rank "
                "alone, or have drifted apart (`tp_plugin: {audit_every: 1}` says when and which)"
            )
        return ELSEWHERE

    def local(self, key: str) -> torch.Tensor:
        """This rank's tensor named ``key`` (a parameter's first name in the model)."""
        return self.parameters()[key]

    def whole(self, key: str, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor of a sharded parameter, on the CPU; the same object for tied names."""
        layout = self.plan.layouts[key]
        if not layout.is_sharded:
            return local
        name = self._first_name(key)
        memo = (name, self.exchange.sync_points.clock, local._version)
        whole = self._wholes.get(memo)
        if whole is None:
            whole = read_full_tensor(self.exchange, self.uid, name, local, layout)
            self._wholes[memo] = whole
        return whole

    def promise(self, key: str, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor of a sharded parameter, read when it is used; the same object for tied names."""
        layout = self.plan.layouts[key]
        if not layout.is_sharded:
            return local
        name = self._first_name(key)
        promise = self._promises.get(name)
        if promise is None:
            read = functools.partial(read_full_tensor, self.exchange, self.uid, name, local, layout)
            promise = self._promises[name] = LazyFullTensor.of(layout.shape, local.dtype, read)
        return promise

    def _first_name(self, key: str) -> str:
        model = self.model()
        assert model is not None
        tensor = model.get_parameter(key)
        return next(name for name, parameter in self.parameters().items() if parameter is tensor)

    def audit(self) -> None:
        """Compare replicated parameters, and replicas of shards, across the TP group; also those beside the model.

        Raises:
            DivergenceError: on every rank, naming the first parameter that differs.
        """
        names, checksums = [], []
        tp = self.mesh.tp
        for name, parameter in self.parameters().items():
            layout = self.plan.layouts[name]
            if not layout.is_sharded:
                names.append((name, tuple(range(tp.size))))
                checksums.append(checksum(parameter))
            for group in layout.replica_groups:
                names.append((name, group))
                ranges = layout.replicated_in(tp.rank, group) if tp.rank in group else ()
                assert layout.dim is not None
                whole = joined(parameter.detach())
                parts = [whole.narrow(layout.dim, a, b - a) for a, b in ranges]
                checksums.append(checksum(torch.cat(parts, layout.dim)) if parts else 0)
        for name, parameter in self._beside().items():
            names.append((name, tuple(range(tp.size))))
            checksums.append(checksum(parameter))
        everyone = torch.stack(self.mesh.control.all_gather(torch.tensor(checksums, dtype=torch.int64)))
        for column, (name, ranks) in enumerate(names):
            seen = everyone[list(ranks), column].tolist()
            if len(set(seen)) > 1:
                shown = ", ".join(f"rank {tp.ranks[r]}: {value:08x}" for r, value in zip(ranks, seen, strict=True))
                raise DivergenceError(
                    f"replicated parameter {name!r} has drifted apart within the TP group ({shown}); it was updated "
                    "differently on each rank. Look for code that changes weights by RANK or with a generator that "
                    "differs between ranks"
                )


def totals() -> dict[str, int]:
    """Bytes of parameters this process ever sharded, here and whole."""
    return dict(_totals)


_totals: Counter[str] = Counter(parameter_bytes=0, whole_parameter_bytes=0)


def read_full_tensor(
    exchange: PeerTransport, uid: str, key: str, local: torch.Tensor, layout: ParamLayout
) -> torch.Tensor:
    """Assemble a whole tensor on the CPU, one peer's shard at a time."""
    whole = torch.empty(layout.shape, dtype=local.dtype)
    me = exchange.mesh.tp.rank
    layout.place(whole, local.detach().cpu(), me)
    for rank in range(layout.tp):
        if rank != me:
            layout.place(whole, exchange.read(uid, key, rank), rank)
    return whole


def checksum(tensor: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of the bytes of what this rank holds of a tensor, continuing from ``start``."""
    return zlib.crc32(held(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)
