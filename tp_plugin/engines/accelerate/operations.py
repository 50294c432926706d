"""Accelerate's collectives, which name no group and therefore mean the world.

Each TP rank gathers and reduces over its own DP group, so that nothing is counted tp times. All TP ranks hold the same
value, or take their leader's: a script may have chosen it by ``is_main_process``, or drawn it. A broadcast goes from
the leader of its source process to the whole world, because the value may exist on that one rank only.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import DivergenceError
from tp_plugin.mesh import host_copy
from tp_plugin.runtime.digests import digest
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import COLLECTIVE
from tp_plugin.tensor.vocab import Logits

_leaders_only: ContextVar[bool] = ContextVar("tp_plugin.leaders_only", default=False)


@contextlib.contextmanager
def leaders_only() -> Iterator[None]:
    """Inside, only the leaders of the TP groups are at work, and they are the world."""
    token = _leaders_only.set(True)
    try:
        yield
    finally:
        _leaders_only.reset(token)


def meet_at(operation: str, value: Any = None) -> Any:
    """The ranks of a TP group come to Accelerate's collectives together, or are told that they do not.

    Returns:
        What the group gives to the collective: ``value``, a tensor or an object, as the leader has it.

    Raises:
        DivergenceError: they are at different collectives, or not all at one, or their tensors differ in shape.
    """
    mesh = current_mesh()
    if mesh is None or _leaders_only.get():
        return value
    if isinstance(value, Logits):
        value = value.gathered()
    kind, content = _digest(value)
    met = require().sync_points.rendezvous(COLLECTIVE, [zlib.crc32(operation.encode()), kind, content])
    if len({values[0] for values in met}) > 1:
        raise DivergenceError(
            f"the ranks {list(mesh.unit.ranks)} of a TP group came to different collectives of Accelerate (this one to "
            f"{operation}); they are one process and must make the same calls"
        )
    if len({values[1] for values in met}) > 1:
        found = (
            f"a tensor of {tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
        )
        raise DivergenceError(
            f"the ranks {list(mesh.unit.ranks)} of a TP group came to {operation} with values of different shapes "
            f"(this one with {found}); they are one process and must give the same. If only the main process has the "
            "value, use broadcast, or pad_across_processes before"
        )
    on_device = isinstance(value, torch.Tensor) and not host_copy.is_on_host(value)
    if len({values[2] for values in met}) == 1 and not on_device:
        return value
    if isinstance(value, torch.Tensor):
        return mesh.unit_for(value).broadcast(value.detach().clone(memory_format=torch.contiguous_format))
    return mesh.unit_cpu.broadcast_object(value)


def _digest(value: Any) -> tuple[int, int]:
    """Checksums of what must be equal within a group, and of what is the leader's else.

    What lies on a device is not looked at, as the host would wait for it: the leader's is sent.
    """
    if value is None:
        return 0, 0
    if isinstance(value, torch.Tensor):
        content = digest(value)[2] if host_copy.is_on_host(value) else 0
        return zlib.crc32(repr((tuple(value.shape), str(value.dtype))).encode()), content
    return 1, zlib.crc32(pickle.dumps(value))


class DPScopedDist:
    """``torch.distributed`` whose calls without a group mean the DP group. Ranks are process indices."""

    # every function of torch.distributed that the patched modules call; a test reads their sources
    HANDLED = (
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
        "broadcast",
        "broadcast_object_list",
    )

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        mesh = current_mesh()
        if name not in self.HANDLED or mesh is None:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            if name.startswith("broadcast"):
                meet_at(name)
                return self._broadcast(function, *args, **kwargs)
            if name == "all_reduce":
                given = meet_at(name, args[0])
                if given is not args[0]:
                    args[0].copy_(given)
            else:
                args = (args[0], meet_at(name, args[1]), *args[2:])
            if mesh.dp_size == 1:
                return _alone(name, *args)
            return function(*args, group=mesh.data.pg, **kwargs)

        return call

    def _broadcast(self, function: Any, value: Any, src: int = 0) -> Any:
        mesh = current_mesh()
        assert mesh is not None
        if not _leaders_only.get():
            return function(value, src=mesh.leader_of(src))
        return function(value, group=mesh.data.pg, group_src=src) if mesh.dp_size > 1 else None


def _alone(name: str, output: Any, value: Any = None) -> None:
    """A collective of one process."""
    if name == "all_reduce":
        return
    if name == "all_gather_into_tensor":
        output.copy_(value.reshape(output.shape))
    else:
        output[0] = value


class TorchWithScopedDist:
    """The ``torch`` module with :class:`DPScopedDist` as its ``distributed``."""

    distributed = DPScopedDist()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _OneProcess:
    """A ``PartialState`` on which Accelerate's operations take the one process for all there is."""

    def __init__(self, state: Any):
        from accelerate.utils import DistributedType

        self._state, self.distributed_type = state, DistributedType.NO

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def _state(original: Any) -> Any:
    """One process gathers and reduces nothing, whatever the type of its run: as without us, no shape changes."""
    state, mesh = original(), current_mesh()
    alone = mesh is not None and mesh.dp_size == 1 and state.distributed_type.value.startswith("MULTI_")
    return _OneProcess(state) if alone else state


def install_operations(operations: Any) -> None:
    """Patch ``accelerate.utils.operations``."""
    patch(operations, "torch", TorchWithScopedDist())
    patch(operations, "PartialState", functools.partial(_state, operations.PartialState))
    wrap(operations, "broadcast", _broadcast)
    wrap(operations, "broadcast_object_list", _broadcast_object_list)


def install_random(random: Any) -> None:
    """Patch ``accelerate.utils.random`` (generator states are broadcast from process 0)."""
    patch(random, "torch", TorchWithScopedDist())


def _undistributed() -> bool:
    # with dp = 1 these operations see no distributed run and would not broadcast, but the TP group has several ranks
    mesh = current_mesh()
    return mesh is not None and mesh.dp_size == 1 and not _leaders_only.get()


def _broadcast(original: Any, tensor: Any, from_process: int = 0) -> Any:
    if not _undistributed():
        return original(tensor, from_process=from_process)
    from accelerate.utils import recursively_apply

    meet_at("broadcast")

    def send(value: torch.Tensor) -> torch.Tensor:
        mesh = current_mesh()
        assert mesh is not None
        mesh.unit_for(value).broadcast(value)
        return value

    return recursively_apply(send, tensor, error_on_other_type=True)


def _broadcast_object_list(original: Any, object_list: list[Any], from_process: int = 0) -> list[Any]:
    if not _undistributed():
        return original(object_list, from_process=from_process)  # type: ignore[no-any-return]
    meet_at("broadcast_object_list")
    mesh = current_mesh()
    assert mesh is not None
    object_list[:] = mesh.unit_cpu.broadcast_object(list(object_list))
    return object_list
