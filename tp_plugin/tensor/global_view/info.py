"""What is known of a tensor that looks whole, and the way between it and what this rank holds of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.graphs import untraced

Applied = tuple[Callable[[Any], Any], ...]
"""Functions of one tensor, one after the other."""


class Peers(Protocol):
    """What one model's tensors need of the ranks that hold the other shards."""

    mesh: Mesh

    def stamp(self) -> object:
        """Changes whenever a parameter or a gradient may have changed."""

    def written(self, tensor: Any) -> None:
        """The script has written into ``tensor``, a parameter's or a gradient's, on the current stream."""

    def meet(self, what: str) -> bool:
        """Wait until the ranks of the unit are at the same ``what``; False: the leader is here alone. Collective."""

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter in host memory, of which the other ranks, which are elsewhere, give their shards."""

    def line(self) -> str:
        """The line of the script, for messages."""

    def show(self, parameter: Any, info: GlobalInfo) -> None:
        """From now on ``parameter`` looks whole to the script."""

    def keep(self, tensor: Any, whole: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The whole of ``tensor``, made once and held until the next step: somebody has its address."""

    def step(self) -> AbstractContextManager[None]:
        """Inside, parameters are what this rank holds."""

    def script(self) -> AbstractContextManager[None]:
        """Inside, a hook of the script's runs, in the middle of a step."""


@dataclass(frozen=True, eq=False)
class GlobalInfo:
    """What is known of one tensor that looks whole.

    Attributes:
        name: its parameter's, with ``.grad`` for a gradient.
        layout: how it lies on the TP ranks. Not sharded: a parameter of which each rank computes a partial gradient.
        summed: whether a hook sums the parameter's gradient over the ranks that share elements, so that only the first
            of them may give one for a number that all compute.
        peers: the other ranks.
        applied: what made it of the parameter; None if that cannot be said.
        made: when, for all but the parameter itself: the peers' stamp.
    """

    name: str
    layout: ParamLayout
    summed: bool
    peers: Peers
    applied: Applied | None = ()
    made: object = None

    @property
    def is_whole(self) -> bool:
        """Whether each TP rank has all there is: a replicated parameter with its full gradient."""
        return self.layout.dim is None and not self.summed

    @property
    def rank(self) -> int:
        """This rank in the TP group."""
        return self.peers.mesh.unit.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return self.layout.shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what this TP rank holds."""
        return self.layout.local_shape(self.rank)

    def of_gradient(self) -> GlobalInfo:
        """The same for the parameter's gradient, which no other rank can read."""
        return replace(self, name=f"{self.name}.grad", applied=None)

    def describe(self) -> str:
        """For messages: ``this rank holds 126 of 251 rows of 'model.embed_tokens.weight'``."""
        dim = self.layout.dim
        if dim is None:
            return f"this rank holds all of {self.name!r}"
        held, size = sum(b - a for a, b in self.layout.parts[self.rank]), self.shape[dim]
        return f"this rank holds {held} of {size} {'rows' if dim == 0 else 'columns'} of {self.name!r}"


CLASSES: dict[str, Callable[[], type]] = {}
"""The class that an ordinary one becomes, by its name (classes.py)."""


def info_of(value: Any) -> GlobalInfo | None:
    """What is known of ``value``, if that looks like more than this rank holds; else None."""
    if type(value) not in _GLOBAL:
        return None
    info: GlobalInfo | None = getattr(value, "tp_global", None)
    return None if info is None or (info.is_whole and not is_split(value)) else info


def is_global(value: object) -> bool:
    """Whether ``value`` looks whole at present."""
    return type(value) in _GLOBAL


def any_global(values: Iterable[object]) -> bool:
    """Whether one of ``values`` does. (Every layer asks, several times in each forward.)"""
    return not _GLOBAL.isdisjoint(map(type, values))


_GLOBAL: set[type] = set()


def register(name: str, make: Callable[[], type]) -> None:
    """Tensors of the class of that name become what ``make`` gives."""

    def made() -> type:
        found = make()
        if found not in _GLOBAL:
            _GLOBAL.add(found)
            untraced(found)
        return found

    CLASSES[name] = made


def shown_class(tensor: Any, kind: type) -> type:
    """The class in which ``tensor``, of class ``kind``, looks whole."""
    return CLASSES["DTensor" if is_split(tensor) else kind.__name__]()


def as_global(tensor: Any, info: GlobalInfo) -> Any:
    """``tensor``, this rank's memory, as one that looks whole: the same object of another class."""
    tensor.__class__ = shown_class(tensor, type(tensor))
    tensor.tp_global = info
    return tensor


def local_of(tensor: Any) -> Any:
    """What this rank holds, as an ordinary tensor that shares its memory and its graph; others are as they are."""
    if type(tensor) not in _GLOBAL:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view_as(tensor) if tensor.requires_grad and torch.is_grad_enabled() else tensor.detach()
