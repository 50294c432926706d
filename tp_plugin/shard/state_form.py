"""In which form ``state_dict`` of sharded models and their optimizers gives tensors, for the code inside a block."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar


class StateForm(enum.Enum):
    """Full tensors, this rank's own, or full ones that are read when they are used."""

    FULL = enum.auto()
    LOCAL = enum.auto()
    LAZY = enum.auto()


_form: ContextVar[StateForm] = ContextVar("tp_plugin.state_form", default=StateForm.FULL)


def form() -> StateForm:
    """What ``state_dict`` gives just now."""
    return _form.get()


@contextlib.contextmanager
def _within(chosen: StateForm) -> Iterator[None]:
    token = _form.set(chosen)
    try:
        yield
    finally:
        _form.reset(token)


def local_states() -> contextlib.AbstractContextManager[None]:
    """Inside, ``state_dict`` of models and optimizers is this rank's own: for checkpoints that all ranks write."""
    return _within(StateForm.LOCAL)


def lazy_full_tensors() -> contextlib.AbstractContextManager[None]:
    """Inside, ``state_dict`` of a sharded model gives full tensors that are read when they are used."""
    return _within(StateForm.LAZY)
