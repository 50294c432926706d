"""The index of a model's parameters, by name; code that replaces a parameter's object tells it (:func:`rebind`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import held
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout, Plan
from tp_plugin.shard.quantized import STATISTICS, cut_statistics, is_code
from tp_plugin.tensor.global_view import GlobalInfo, Peers
from tp_plugin.tensor.global_view.attributes import accumulated_hook, gradient_hook
from tp_plugin.tensor.on_shards import on_shards
from tp_plugin.tensor.param_entry import ParamEntry, bind, entry_of
from tp_plugin.tensor.replicas import Piece, ReplicaSum, ReplicaSums


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing and ``torch.compile`` put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def rebind(old: Any, new: Any) -> None:
    """``new`` stands for the parameter that ``old`` stood for, if that is one of a sharded model.

    FSDP2 puts a DTensor in a parameter's place and computes with another that it gathers; gradient sums of replicas are
    hooked to whichever autograd sees, by :func:`hook_replica_sum`.
    """
    entry = entry_of(old)
    if entry is not None:
        bind(new, entry)


def hook_replica_sum(tensor: Any) -> None:
    """Sum the gradients of ``tensor``'s replicated elements, if it stands for a parameter that has some."""
    entry = entry_of(tensor)
    if entry is not None and entry.replica_sum is not None:
        entry.replica_sum.hook(tensor)


def _take_hooks(parameter: Any) -> dict[int, Any]:
    """A script's own hooks of its gradient, which have to come after the sum over replicas; taken off."""
    own = dict(parameter._backward_hooks or {})
    if own:
        parameter._backward_hooks.clear()
    return own


def _give_hooks(parameter: Any, own: dict[int, Any], seen: GlobalInfo) -> None:
    """Put them back, under the numbers by which their handles know them: they get whole gradients."""
    for number, hook in own.items():
        parameter._backward_hooks[number] = hook if hasattr(hook, "gets_whole") else gradient_hook(hook, seen)
    accumulated = parameter._post_accumulate_grad_hooks or {}
    for number, hook in accumulated.items():
        accumulated[number] = hook if hasattr(hook, "gets_whole") else accumulated_hook(hook, seen)


def _summed(name: str, layout: ParamLayout, plan: Plan, mesh: Mesh) -> Iterator[Piece]:
    """The parts of a gradient of which other ranks have computed other addends: of TP ranks, of a tied weight's stages.

    Raises:
        TPError: both at once, of which the second sum would be of what the first has not summed.
    """
    me, planned = mesh.tp.rank, plan.layouts[name]
    if name in plan.partial:
        yield mesh.tp, None, ()
    else:
        for ranks in planned.replica_groups:
            if me in ranks:
                unit_ranks = tuple(mesh.pp.rank * mesh.tp_size + rank for rank in ranks)
                yield mesh.replicas(unit_ranks), planned.dim, planned.replicated_in(me, ranks)
    stages = [stage for stage in range(mesh.pp_size) if stage * mesh.tp_size + me not in layout.absent]
    if len(stages) > 1:
        if name in plan.partial or planned.replica_groups:
            raise TPError(
                f"parameter {name!r} lies on the pipeline stages {stages}, and its gradient is summed over the TP "
                "group, too; write pp_size: 1"
            )
        yield mesh.replicas([stage * mesh.tp_size + me for stage in stages]), None, ()


class ParamIndex:
    """Parameters of one sharded model.

    Attributes:
        layouts: layout by name, tied names included; also of what decodes weights in codes and is cut as they are.
    """

    def __init__(self, model: nn.Module, layouts: Mapping[str, ParamLayout]):
        self._model = weakref.ref(model)
        self.layouts = dict(layouts)
        self._in_codes = any(name.endswith(STATISTICS) for name in self.layouts)
        self._tensors: dict[str, torch.Tensor] = {}
        self._entries: list[ParamEntry] = []

    def attach(self, plan: Plan, mesh: Mesh, peers: Peers, sums: ReplicaSums) -> None:
        """Bind every parameter of the model to its entry, and hook the gradient sums of replicas. Collective."""
        model = self._model()
        assert model is not None
        groups = sorted({ranks for layout in self.layouts.values() for ranks in layout.replica_groups})
        for ranks in groups:
            mesh.replicas(ranks)  # made in one order on all ranks
        self._entries = []
        for name, parameter in model.named_parameters():
            layout = self.layouts[name]
            trainable = parameter.is_floating_point() and mesh.unit.rank not in layout.absent  # codes are integers
            pieces = list(_summed(name, layout, plan, mesh)) if trainable else []
            seen = GlobalInfo(name, layout, bool(pieces), peers)
            shown = layout.is_sharded or not is_code(parameter)  # whole codes are read with whole scales
            entry = ParamEntry(name, layout, ReplicaSum(pieces, sums) if pieces else None, seen if shown else None)
            self._entries.append(entry)
            bind(parameter, entry)
            own = _take_hooks(parameter)
            hook_replica_sum(parameter)
            _give_hooks(parameter, own, seen)

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's tensors by name, tied ones once; they outlive the model for as long as a peer may read them."""
        model = self._model()
        if model is not None:
            self._tensors = {plain_name(name): parameter for name, parameter in model.named_parameters()}
            if self._in_codes:
                self._tensors |= {plain_name(name): tensor for name, tensor, _ in cut_statistics(model)}
        return self._tensors

    def gradients(self) -> Iterator[tuple[tuple[int, int], ParamLayout]]:
        """Where this rank's gradients lie, and the layouts of their parameters."""
        for entry in self._entries:
            for reference in entry.tensors:
                tensor = reference()
                if tensor is not None and tensor.grad is not None:
                    yield _elements(tensor.grad), entry.layout

    def check(self, rank: int) -> None:
        """Look whether the model has the parameters that were sharded, and no others, and holds shards of them.

        Raises:
            TPError: names one that a script added or replaced since, or made whole.
        """
        model = self._model()
        assert model is not None
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = plain_name(name)
            if plain in self.layouts and entry_of(parameter) is not None:
                layout = self.layouts[plain]
                if layout.is_sharded and tuple(parameter.shape) == layout.shape != layout.local_shape(rank):
                    raise TPError(
                        f"parameter {plain!r} is whole, {layout.shape}, where {type(model).__name__} computes with "
                        f"this rank's shard of it, {layout.local_shape(rank)}; write to whole weights inside `with "
                        "tp_plugin.full_parameters(model, write=True):`, which ends before the model is called or saved"
                    )
                continue
            raise TPError(
                f"parameter {plain!r} {'was replaced' if plain in self.layouts else 'was added'} after "
                f"{type(model).__name__} was sharded: each rank would train another part of it as if it were whole. Do "
                "what changes a model (adapters, resize_token_embeddings, pruning, parametrizations, new layers) "
                "before accelerator.prepare, deepspeed.initialize or tp_plugin.parallelize"
            )

    def first_name(self, name: str) -> str:
        """The name under which :meth:`tensors` has the parameter ``name``."""
        model, tensors = self._model(), self.tensors()
        assert model is not None
        if name in tensors:
            return name
        tensor = model.get_parameter(name)
        return next(first for first, parameter in tensors.items() if parameter is tensor)

    def rename(self) -> None:
        """Follow modules that moved in the model since :meth:`tensors` was last called (PEFT unloads adapters)."""
        model = self._model()
        assert model is not None
        known = {id(parameter): self.layouts[name] for name, parameter in self._tensors.items()}
        names = dict(model.named_parameters(remove_duplicate=False))
        self.layouts = {name: known[id(parameter)] for name, parameter in names.items()}
        self.layouts |= {name: layout for name, _, layout in cut_statistics(model)}


@on_shards
def layouts_of(tensors: Sequence[torch.Tensor], indexes: Iterable[ParamIndex]) -> list[ParamLayout | None]:
    """The layout of each tensor's parameter; None for tensors of no indexed model.

    Args:
        tensors: parameters, their ``.grad``, or aliases of these (``p.grad.detach()``), which share their elements.
    """
    of_gradient: dict[tuple[int, int], ParamLayout] = {}
    for index in indexes:
        of_gradient.update(index.gradients())
    entries = [entry_of(tensor) for tensor in tensors]
    return [
        of_gradient.get(_elements(tensor)) if entry is None else entry.layout
        for tensor, entry in zip(tensors, entries, strict=True)
    ]


def _elements(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for two live tensors of the same elements; those of none are equal, too."""
    local = held(tensor)
    return local.data_ptr(), local.numel()


def is_unnamed_shard(tensor: torch.Tensor, indexes: Iterable[ParamIndex]) -> bool:
    """Whether ``tensor``, which stands for no parameter, has the shape of a rank's rows of a vocabulary: a copy."""
    layouts = {layout for index in indexes for layout in index.layouts.values()}
    shards = [layout for layout in layouts if layout.pad_to is not None and layout.dim == 0]
    return any(tuple(tensor.shape) == layout.local_shape(0) != layout.shape for layout in shards)
