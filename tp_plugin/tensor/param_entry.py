"""What is known of one parameter of a sharded model, on the tensor objects that stand for it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.global_view import GlobalInfo
from tp_plugin.tensor.replicas import ReplicaSum


@dataclass
class ParamEntry:
    """One parameter; tied names share it.

    Attributes:
        name: its first name in the model.
        layout: how it lies on the TP ranks.
        replica_sum: the hook that sums gradients of replicated elements, if there are some.
        seen: as what the script sees it, if that is more than this rank has.
        tensors: those that stand for it, as far as they live.
    """

    name: str
    layout: ParamLayout
    replica_sum: ReplicaSum | None = None
    seen: GlobalInfo | None = None
    tensors: list[weakref.ref[Any]] = field(default_factory=list, init=False)

    def copy_to(self, copied: Any) -> None:
        """A copy of the parameter stands for it until the copied model gets entries of its own."""
        # other ranks could give their shards of the original only
        bind(copied, replace(self, replica_sum=None, seen=self.seen and replace(self.seen, applied=None)))


def bind(tensor: Any, entry: ParamEntry) -> None:
    """Let ``tensor`` stand for the parameter: the Parameter itself, or what an engine puts in its place.

    Sets ``tensor_model_parallel``, the attribute by which Megatron-LM and DeepSpeed know sharded parameters.
    """
    tensor.tp_entry = entry
    entry.tensors = [ref for ref in entry.tensors if (living := ref()) is not None and living is not tensor]
    entry.tensors.append(weakref.ref(tensor))
    tensor.tensor_model_parallel = entry.layout.is_sharded
    if entry.seen is not None:
        entry.seen.peers.show(tensor, entry.seen)


def entry_of(tensor: torch.Tensor) -> ParamEntry | None:
    """The parameter that ``tensor`` stands for, else None."""
    entry: ParamEntry | None = getattr(tensor, "tp_entry", None)
    return entry


def layout_of(tensor: torch.Tensor) -> ParamLayout | None:
    """The layout of the parameter that ``tensor`` stands for, else None."""
    entry = entry_of(tensor)
    return None if entry is None else entry.layout
