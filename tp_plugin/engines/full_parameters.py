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
from tp_plugin.shard.quantized import is_code
from tp_plugin.shard.replicas import agree_on
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.param_entry import bind, entry_of, layout_of


@contextlib.contextmanager
def full_parameters(module: nn.Module, write: bool = False) -> Iterator[None]:
    """Inside the block, the parameters of ``module`` are whole: their shapes, elements and norms are the model's.

    For scripts that read or edit weights after ``prepare``: ``model.get_input_embeddings().weight[-9:] = mean``. Works
    under DDP, ZeRO 0 to 3 (in place of ``deepspeed.zero.GatheredParameters``) and FSDP2, and does nothing in a run
    without ``tp_size``. Collective: every rank of the run makes the call. It holds all of ``module`` on the device:
    give it the part that you need. Gradients are whole in the block, too, and may be written to likewise.

    Args:
        module: a model, wrapped or not, or a part of one.
        write: put what was written into the parameters into the shards; of what ranks of a TP group wrote differently,
            the first rank's. DeepSpeed's fp32 copies are written to as well.

    Raises:
        TPError: a parameter was written to without ``write=True``; the model was called in the block.
    """
    runtime = current()
    parameters = {
        plain_name(name): parameter
        for name, parameter in module.named_parameters()
        if not (is_code(parameter) and layout_of(parameter) is not None)  # which mean nothing without their scales
    }
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
                agree_on({name: tensor for one in whole for name, tensor in one.tensors().items()}, runtime.mesh)
            elif written := [one.name for one in whole if one.versions() != one.before]:
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
        grad: the gradient that was, and will be, this rank's.
        seen: what the script sees in its place: ``kept`` itself, except where that is FSDP2's.
        places: modules and attributes that have ``seen`` instead of ``kept``.
        before: the versions of ``seen`` and its gradient, before the script had them.
        looked_whole: whether the script's region showed it whole before; now it is.
    """

    name: str
    kept: Any
    local: torch.Tensor | None
    grad: torch.Tensor | None
    seen: Any
    places: list[tuple[nn.Module, str]]
    before: tuple[object, ...] = ()
    looked_whole: bool = False

    @staticmethod
    def of(name: str, parameter: Any, module: nn.Module, mesh: Mesh) -> _Whole:
        """Make ``parameter`` whole. Collective over the data group and the TP group."""
        full, grad = _full(parameter, parameter, mesh), parameter.grad
        full_grad = None if grad is None else _full(grad, parameter, mesh)
        places = []
        if is_split(parameter):
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
            made = _Whole(name, parameter, None, grad, seen, places)
        else:
            layout = layout_of(parameter)
            local = parameter.data if layout is not None and layout.is_sharded else None
            made = _Whole(name, parameter, local, grad, parameter, places)
            if local is not None:
                parameter.grad = None  # of another shape than what comes
                parameter.data = full
        if made.is_exchanged:
            made.seen.grad = full_grad
        made.before = made.versions()
        return made

    @property
    def is_exchanged(self) -> bool:
        """Whether the script sees other memory than this rank's."""
        return self.local is not None or bool(self.places)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the script may have written to, by name."""
        grad = self.seen.grad
        return {self.name: self.seen.detach()} | ({} if grad is None else {f"{self.name}.grad": grad.detach()})

    def versions(self) -> tuple[object, ...]:
        """Other ones if something was written to."""
        grad = self.seen.grad
        return self.seen._version, id(grad), None if grad is None else grad._version

    def restore(self, write: bool, runtime: Runtime) -> None:
        """Give the model its own object and memory back, with what was written if ``write``; communicates nothing."""
        full, full_grad = self.seen.detach(), self.seen.grad
        if self.looked_whole:
            runtime.region.include(self.seen)
        for owner, attribute in self.places:
            owner._parameters[attribute] = self.kept
        if not self.is_exchanged:
            return
        if self.local is not None:
            self.kept.grad = None
            self.kept.data = self.local
        if write:
            with torch.no_grad():
                self.kept.copy_(self._mine(full, runtime.mesh))
            self.kept.grad = None if full_grad is None else self._written_grad(full_grad, runtime.mesh)
            runtime.progress.weights_changed(full.device)
        else:
            self.kept.grad = self.grad

    def _mine(self, full: torch.Tensor, mesh: Mesh) -> Any:
        layout = layout_of(self.kept)
        mine = full
        if layout is not None and layout.is_sharded:
            mine = layout.shard(full, mesh.unit.rank).to(full.device)
        return split_like(mine, self.kept) if self.places else mine

    def _written_grad(self, full: torch.Tensor, mesh: Mesh) -> Any:
        mine = self._mine(full, mesh)
        if self.grad is None:
            return mine
        with torch.no_grad():
            self.grad.copy_(mine)  # in its own memory, which may be a bucket's
        return self.grad


def _full(tensor: Any, parameter: Any, mesh: Mesh) -> torch.Tensor:
    """All of a parameter or its gradient. Collective over the data group and the TP group."""
    layout = layout_of(parameter)
    with torch.no_grad():
        local = all_rows(tensor.detach())
        if layout is None or not layout.is_sharded:
            return local
        return gather_shards(local, layout, mesh.unit_for(local)).to(local.device)
