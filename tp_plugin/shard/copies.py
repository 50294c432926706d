"""Whole weights that ``state_dict()`` gave are copies: a script that writes into one means the model, and is told."""

from __future__ import annotations

import torch

from tp_plugin.errors import TPError


class Copies:
    """Copies of one model's weights that a script has got."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[torch.Tensor, int]] = {}

    def give(self, name: str, copy: torch.Tensor) -> torch.Tensor:
        """Note ``copy``, which is returned; it is not kept alive."""
        if not copy.is_inference():
            counter = copy.detach()  # shares the version counter
            counter.data = torch.empty(0, dtype=copy.dtype, device=copy.device)  # but not the memory
            self._given[name] = counter, copy._version
        return copy

    def check(self) -> None:
        """Look whether something was written into a copy.

        Raises:
            TPError: names its parameter.
        """
        for name, (counter, version) in self._given.items():
            if counter._version != version:
                self.forget()
                raise TPError(
                    f"{name!r} of a state_dict() was written to in place. With tp_size it is a copy, so the model has "
                    "not changed: write inside `with tp_plugin.full_parameters(model, write=True):`, or pass the "
                    "edited state dict to load_state_dict"
                )

    def forget(self) -> None:
        """What was given has been loaded, or told about."""
        self._given.clear()
