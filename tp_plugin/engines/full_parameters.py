"""``tp_plugin.full_parameters``: a ``with`` block in which the parameters of a sharded model are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import all_rows, is_split, split_like
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.runtime import Runtime, current
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard.full_tensor import gather_shards
from tp_plugin.shard.params import plain_name
from tp_plugin.shard.replicas import agree_on
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.param_entry import bind, entry_of, layout_of


@contextlib.contextmanager
def full_parameters(module: nn.Module, write: bool = False) -> Iterator[None]:
    """Inside the block, the parameters of ``module`` are whole: their shapes, elements and norms are the model's.

    For scripts that read or edit weights after ``prepare``: ``model.get_input_embeddings().weight[-9:] = mean``. Works
    under DDP, ZeRO 0 to 3 (in place of ``deepspeed.zero.GatheredParameters``) and FSDP2, and does nothing in a run
    without ``tp_size``. Collective: every rank of the run makes the call. It holds all of ``module`` on the device:
    give it the part that you need. Gradients stay shares.

    Args:
        module: a model, wrapped or not, or a part of one.
        write: put what was written into the parameters into the shards; of what ranks of a TP group wrote differently,
            the first rank's. DeepSpeed's fp32 copies are written to as well.

    Raises:
        TPError: a parameter was written to without ``write=True``; the model was called in the block.
    """
    runtime = current()
    parameters = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    if runtime is not None:
        runtime.sync_points.rendezvous(BARRIER)
    with _gathered_by_deepspeed(list(parameters.values()), write, runtime):
        if runtime is None:
            yield
            return
        whole: list[_Whole] = []
        runtime.progress.registered += 1  # a forward looks, and refuses
        try:
            with runtime.region.step():
                for name, parameter in parameters.items():  # in the ``try``: memory may not suffice for all
                    whole.append(_Whole.of(name, parameter, module, runtime.mesh))
                    whole[-1].looked_whole = runtime.region.exempt(whole[-1].seen)
            yield
            if write:
                agree_on({one.name: one.seen.detach() for one in whole}, runtime.mesh)
            elif written := [one.name for one in whole if one.seen._version != one.version]:
                raise TPError(
                    f"parameter {written[0]!r} was written to inside tp_plugin.full_parameters(model), which only "
                    "reads; write `with tp_plugin.full_parameters(model, write=True):`"
                )
        except BaseException:
            write = False
            raise
        finally:
            with runtime.region.step():
                for one in whole:
                    one.restore(write, runtime)
            runtime.progress.registered += 1


def _gathered_by_deepspeed(
    parameters: list[Any], write: bool, runtime: Runtime | None
) -> contextlib.AbstractContextManager[None]:
    if not any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return contextlib.nullcontext()
    from tp_plugin.engines.deepspeed.full_parameters import gathered

    return gathered(parameters, write, ScriptRegion() if runtime is None else runtime.region)


@dataclass
class _Whole:
    """One parameter.

    Attributes:
        name: in the module that was given.
        kept: the object that was, and will be, in the model.
        local: this TP rank's memory of it; None where that is all of the tensor, or FSDP2 holds it.
        seen: what the script sees in its place: ``kept`` itself, except where that is FSDP2's.
        places: modules and attributes that have ``seen`` instead of ``kept``.
        version: of ``seen``, before the script had it.
        looked_whole: whether the script's region showed it whole before; now it is.
    """

    name: str
    kept: Any
    local: torch.Tensor | None
    seen: Any
    places: list[tuple[nn.Module, str]]
    version: int
    looked_whole: bool = False

    @staticmethod
    def of(name: str, parameter: Any, module: nn.Module, mesh: Mesh) -> _Whole:
        """Make ``parameter`` whole. Collective over the data group and the TP group."""
        layout = layout_of(parameter)
        sharded = layout is not None and layout.is_sharded
        split = is_split(parameter)
        with torch.no_grad():
            local = all_rows(parameter.detach())
            full = local
            if layout is not None and sharded:
                full = gather_shards(local, layout, mesh.unit_for(local)).to(local.device)
        if not split:
            if sharded:
                parameter.data = full
            return _Whole(name, parameter, local if sharded else None, parameter, [], parameter._version)
        seen = nn.Parameter(full.clone() if full is parameter._local_tensor else full, parameter.requires_grad)
        entry = entry_of(parameter)
        if entry is not None:
            bind(seen, entry)
        places = [
            (owner, attribute)
            for owner in module.modules()
            for attribute, value in owner._parameters.items()
            if value is parameter
        ]
        for owner, attribute in places:
            owner._parameters[attribute] = seen
        return _Whole(name, parameter, None, seen, places, seen._version)

    def restore(self, write: bool, runtime: Runtime) -> None:
        """Give the model its own object and memory back, with what was written if ``write``; communicates nothing."""
        layout, full = layout_of(self.kept), self.seen.detach()
        if self.looked_whole:
            runtime.region.include(self.seen)
        for owner, attribute in self.places:
            owner._parameters[attribute] = self.kept
        if self.local is not None:
            self.kept.data = self.local
        if not write or (self.local is None and not self.places):
            return
        with torch.no_grad():
            mine = full
            if layout is not None and layout.is_sharded:
                mine = layout.shard(full, runtime.mesh.tp.rank).to(full.device)
            self.kept.copy_(split_like(mine, self.kept) if self.places else mine)
        runtime.progress.weights_changed(full.device)
