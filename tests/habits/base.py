"""What scripts do to parameters and gradients after ``prepare``: each habit is a function of a model.

It returns numbers to be compared with those of the plain model, beside every parameter and gradient afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Model = Any
Habit = Callable[[Model], Any]

HABITS: dict[str, Habit] = {}
"""All, by name, in the order of their files."""

NEED_GRADIENTS: set[str] = set()
"""Those that read ``.grad``, which engines that keep gradients elsewhere (ZeRO) leave empty."""


def habit(function: Habit) -> Habit:
    HABITS[function.__name__] = function
    return function


def gradient_habit(function: Habit) -> Habit:
    NEED_GRADIENTS.add(function.__name__)
    return habit(function)


def weights(model: Model) -> list[Any]:
    return list(model.parameters())


def embedding(model: Model) -> Any:
    return model.get_input_embeddings().weight


def matrix(model: Model, part: str) -> Any:
    """The first 2-d parameter with ``part`` in its name."""
    return next(p for name, p in model.named_parameters() if part in name and p.dim() == 2)


def bare(model: Model) -> Model:
    """The model in whatever an engine has put around it."""
    return getattr(model, "bare", model)
