"""Parameters that a model has under several names (tied weights), as checkpoints record them."""

from __future__ import annotations

from torch import nn


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each second name of a parameter of ``model``, with its first one, in the order of ``named_parameters``."""
    first: dict[int, str] = {}
    second: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            second[name] = owner
    return second
