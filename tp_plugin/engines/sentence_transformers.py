"""sentence-transformers and PyLate: their own collectives, which name no group and therefore mean the world.

Of dp processes: embeddings are gathered as often as there are replicas, and an evaluation is shared among those.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn

from tp_plugin.engines.accelerate.operations import TorchWithScopedDist, meet_at
from tp_plugin.engines.patching import patch
from tp_plugin.engines.trainer import Distributed
from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.runtime.runtime import current_mesh
from tp_plugin.tensor.first_order import first_order


def install(distributed: Any) -> None:
    """Patch ``sentence_transformers.util.distributed`` or ``pylate.utils.distributed``.

    Raises:
        TPError: neither of the modules by which releases reach their collectives is there.
    """
    ways = {name: ours for name, ours in (("dist", _Distributed()), ("torch", _Torch())) if name in vars(distributed)}
    if not ways:
        raise TPError(
            f"{distributed.__name__} has neither `dist` nor `torch`, so its collectives cannot be told of TP groups; "
            "known is sentence-transformers 5 and 6: install one of these, or set tp_size: 1"
        )
    for name, ours in ways.items():
        patch(distributed, name, ours)


class _Gather(torch.autograd.Function):
    """The tensors of all replicas, by autograd; torch's own takes this group's ranks for the world's on gloo."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(part.clone() for part in group.all_gather(tensor))  # torch's are no views of one tensor

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.all_reduce(torch.stack(grads))[ctx.group.rank], None


def _all_gather(tensor: torch.Tensor) -> Any:
    """As ``torch.distributed.nn.all_gather``: each process gets the sum of the gradients of its own part."""
    mesh = current_mesh()
    if mesh is None:
        return torch.distributed.nn.all_gather(tensor)  # type: ignore[no-untyped-call]
    meet_at("nn.all_gather")
    return _Gather.apply(tensor, mesh.data) if mesh.dp_size > 1 else (tensor,)


class ScatteringDistributed(Distributed):
    """``torch.distributed`` of dp processes, one of which gives a Python object to each."""

    @staticmethod
    def scatter_object_list(
        output: list[Any], given: list[Any] | None = None, src: int = 0, group: None = None
    ) -> None:
        mesh = current_mesh()
        if mesh is None:
            return dist.scatter_object_list(output, given, src=src)
        meet_at("scatter_object_list")
        return dist.scatter_object_list(output, given, group=mesh.data.pg, group_src=src)


class _Distributed(ScatteringDistributed):
    """With what else sentence-transformers calls."""

    nn = SimpleNamespace(all_gather=_all_gather)

    @staticmethod
    def gather_object(value: Any, found: list[Any] | None = None, dst: int = 0) -> None:
        mesh = current_mesh()
        if mesh is None:
            return dist.gather_object(value, found, dst=dst)
        meet_at("gather_object")
        return dist.gather_object(value, found, group=mesh.data.pg, group_dst=dst)


class _Torch(TorchWithScopedDist):
    distributed = _Distributed()
