"""The arguments of a call, as a block's forward pre-hook sees and replaces them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Place = tuple[int | str, ...]
"""Where a tensor stands: the argument's position or keyword, then its index in each tuple around it."""

CACHES = ("past", "cache")
"""What the names of arguments contain in which a block is given the keys and values that it kept itself."""


class Arguments:
    """Arguments by their names in the signature.

    Args:
        args, kwargs: what the call was given.
        positions: position of every argument in the signature.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: dict[str, int]):
        self.args, self.kwargs, self.positions = list(args), dict(kwargs), positions

    def tensor(self, name: str) -> torch.Tensor | None:
        """The argument, if it was given and is a tensor."""
        at = self.positions[name]
        value = self.kwargs.get(name, self.args[at] if at < len(self.args) else None)
        return value if isinstance(value, torch.Tensor) else None

    def put(self, name: str, value: torch.Tensor) -> None:
        """Replace an argument that was given."""
        self.replace((self._place(name),), value)

    def inputs(self, names: tuple[str, ...]) -> dict[Place, torch.Tensor]:
        """The tensors at which a block begins, by where they stand.

        Args:
            names: the arguments; ``*``: the first one, and whatever else requires a gradient, in tuples too, but not
                in lists, dicts and caches: those are stores in which blocks keep what they computed on their shards.
        """
        if "*" in names:
            return dict(self._differentiable())
        found: dict[Place, torch.Tensor] = {}
        for name in names:  # every block of every layer asks: no calls
            at: int | str = name if name in self.kwargs else self.positions[name]
            given = self.kwargs.get(name, self.args[at] if isinstance(at, int) and at < len(self.args) else None)
            if isinstance(given, torch.Tensor):
                found[(at,)] = given
        return found

    def replace(self, place: Place, value: torch.Tensor) -> None:
        """Put ``value`` where another tensor stood."""
        first, *inner = place
        store: Any = self.args if isinstance(first, int) else self.kwargs
        store[first] = _replaced(store[first], inner, value) if inner else value

    def _place(self, name: str) -> int | str:
        return name if name in self.kwargs else self.positions[name]

    def _given(self) -> Iterator[tuple[int | str, Any]]:
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def _differentiable(self) -> Iterator[tuple[Place, torch.Tensor]]:
        names = list(self.positions)
        first = self._place(names[0])
        # the block's activations come first, also where the layers before are frozen
        for place, value in sorted(self._given(), key=lambda given: given[0] != first):
            name = place if isinstance(place, str) else names[min(place, len(names) - 1)]
            if place == first and isinstance(value, torch.Tensor):
                yield (place,), value
            elif not any(word in name for word in CACHES):
                yield from _requiring_grad((place,), value)


def _requiring_grad(place: Place, value: object) -> Iterator[tuple[Place, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            yield place, value
    elif type(value) is tuple:
        for index, inner in enumerate(value):
            yield from _requiring_grad((*place, index), inner)


def _replaced(value: Any, place: list[int | str], new: torch.Tensor) -> Any:
    if not place:
        return new
    index, *inner = place
    return tuple(_replaced(old, inner, new) if at == index else old for at, old in enumerate(value))
