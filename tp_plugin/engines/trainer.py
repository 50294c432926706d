"""HF Trainer: what it does on process 0 it does on one rank; what it sends by torch.distributed goes over the DP group.

Most of it follows from Accelerate's state. These are the places at which Trainer asks torch.distributed itself, or
takes ``process_index == 0`` for "one rank".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from tp_plugin.engines.accelerate.operations import OverDP
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.parallel.exchange import exchange
from tp_plugin.parallel.lockstep import BARRIER
from tp_plugin.parallel.mesh import current_mesh


class _Distributed(OverDP):
    """``torch.distributed`` of dp processes, with barriers at which a TP group meets."""

    @staticmethod
    def get_world_size() -> int:
        mesh = current_mesh()
        return dist.get_world_size() if mesh is None else mesh.dp_size

    @staticmethod
    def get_rank() -> int:
        mesh = current_mesh()
        return dist.get_rank() if mesh is None else mesh.dp.rank

    @staticmethod
    def barrier(*args: Any, **kwargs: Any) -> None:
        _meet()
        dist.barrier(*args, **kwargs)


def install_helpers(trainer_pt_utils: Any) -> None:
    """Patch ``transformers.trainer_pt_utils``: scalars and samplers of dp processes."""
    patch(trainer_pt_utils, "dist", _Distributed())


def install_arguments(training_args: Any) -> None:
    """Patch ``TrainingArguments``: one rank saves and logs."""
    patch(training_args, "dist", _Distributed())
    cls = training_args.TrainingArguments
    for name in ("should_save", "should_log"):
        patch(cls, name, _on_leader(vars(cls)[name]))
    wrap(cls, "main_process_first", _main_process_first)


def install(trainer: Any) -> None:
    """Patch ``Trainer``."""
    patch(trainer, "dist", _Distributed())
    cls = trainer.Trainer
    wrap(cls, "is_world_process_zero", lambda original, self: original(self) and _leads())
    wrap(cls, "_save_rng_state", lambda original, self, *args: original(self, *args) if _leads() else None)
    wrap(cls, "_load_best_model", _load_best_model)
    wrap(cls, "save_model", _save_model)


def _leads() -> bool:
    mesh = current_mesh()
    return mesh is None or mesh.is_leader


def _meet() -> None:
    mesh = current_mesh()
    if mesh is not None:
        exchange(mesh).lockstep.meet(BARRIER)


def _on_leader(original: property) -> property:
    return property(lambda self: original.fget(self) and _leads(), doc=original.__doc__)  # type: ignore[misc]


@contextlib.contextmanager
def _main_process_first(original: Any, self: Any, local: bool = True, desc: str = "work") -> Iterator[None]:
    state = getattr(self, "distributed_state", None)
    if current_mesh() is None or state is None:
        with original(self, local, desc):
            yield
        return
    with state.local_main_process_first() if local else state.main_process_first():
        yield


def _save_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(self, *args, **kwargs)
    with exchange(mesh).together("Trainer.save_model"):  # what it wrote is there when any rank returns
        return original(self, *args, **kwargs)


def _load_best_model(original: Any, self: Any) -> Any:
    _meet()  # the leader may still be writing what its peers are about to read
    return original(self)
