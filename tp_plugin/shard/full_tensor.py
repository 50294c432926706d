"""Full tensors out of what all ranks hold, by collectives: for models that FSDP2 has split as well."""

from __future__ import annotations

import torch

from tp_plugin.mesh.dtensor_utils import all_rows
from tp_plugin.mesh.groups import Group
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.on_shards import on_shards


@on_shards
def gather_full_tensor(tensor: torch.Tensor, layout: ParamLayout | None, mesh: Mesh, here: bool = True) -> torch.Tensor:
    """The full tensor in host memory. Collective over the data group, then over the TP group.

    Args:
        tensor: a parameter, or something of its shape (an optimizer's moment).
        layout: how its parameter lies on the TP ranks; None if it is not sharded.
        here: whether this unit wants it; equal on its ranks. Elsewhere the result is this rank's tensor.
    """
    with torch.no_grad():
        local = all_rows(tensor.detach()).cpu()
        if layout is None or not layout.is_sharded or not here:
            return local.clone()
        return gather_shards(local, layout, mesh.unit_cpu)


@on_shards
def gather_shards(local: torch.Tensor, layout: ParamLayout, group: Group) -> torch.Tensor:
    """The full tensor of all ranks' local ones under ``layout``. Collective over ``group``, the TP group."""
    sizes = [layout.local_numel(rank) for rank in range(layout.ranks)]
    sent = local.new_zeros(max(sizes))  # all-gather takes equal lengths only
    sent[: local.numel()] = local.reshape(-1)
    received = group.all_gather(sent)
    return layout.gather([flat[: sizes[rank]].view(layout.local_shape(rank)) for rank, flat in enumerate(received)])
