"""``fully_shard`` over the data group; what is known of a parameter follows to what FSDP2 puts in its place.

FSDP2 replaces a TP rank's tensor by a DTensor of some of its rows, and computes with a third parameter that it gathers
before use. Both stand for the parameter in the index. The gradient sum of replicas is hooked to the gathered one: there
the TP ranks' shapes still agree, and the sum comes before the reduction over the data group, as it does under DDP.

Bytes that a rank puts into collectives of its data group, with P bytes of local parameters (the model's / tp), of which
T are trained, and dp > 1 ranks (Zhao et al. 2023, section 3; torch 2.13, fsdp/_fully_shard/_fsdp_param_group.py). Every
tensor is padded to a multiple of dp rows. Nothing of it exists at dp = 1.

    each micro-batch       all-gather P / dp for the forward, and again for the backward of what was released after the
                           forward (``reshard_after_forward``: all but the final norm and the head)
    each synchronisation   reduce-scatter T

Beside it the norm, 4 bytes. The TP group carries what it carries under DDP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.engines.patching import wrap
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.runtime.runtime import current, current_mesh
from tp_plugin.shard.params import hook_replica_sum, rebind
from tp_plugin.tensor.global_view import as_global, info_of, local_of
from tp_plugin.tensor.param_entry import layout_of


def install(fsdp: Any) -> None:
    """Patch ``torch.distributed.fsdp``."""
    from torch.distributed.tensor import DTensor

    wrap(fsdp, "fully_shard", _fully_shard)
    wrap(fsdp, "fully_shard", in_step)
    wrap(DTensor, "full_tensor", _full_tensor)


def install_state(fsdp_state: Any) -> None:
    """Patch ``FSDPState``: gathering before a forward, and what follows it, are no code of the script's."""
    wrap(fsdp_state.FSDPState, "_pre_forward", _pre_forward)
    wrap(fsdp_state.FSDPState, "_post_forward", _post_forward)
    for name in ("_pre_forward", "_post_forward"):
        wrap(fsdp_state.FSDPState, name, in_step)


def install_param(fsdp_param: Any) -> None:
    """Patch ``FSDPParam``: the gathered parameter is hooked when it is made."""
    wrap(fsdp_param.FSDPParam, "init_unsharded_param", _init_unsharded_param)


def install_group(fsdp_param_group: Any) -> None:
    """Patch ``FSDPParamGroup``: it reduces gradients that are summed over replicas before."""
    wrap(fsdp_param_group.FSDPParamGroup, "post_backward", _post_backward)


def _pre_forward(original: Any, self: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """A pipeline has gathered the weights of its stage (tensor/pipeline/gathered.py)."""
    return self._cast_forward_inputs(args, kwargs) if _passes(self) else original(self, module, args, kwargs)


def _post_forward(original: Any, self: Any, module: Any, given: Any, output: Any) -> Any:
    return self._cast_output_dtype(output) if _passes(self) else original(self, module, given, output)


def _passes(state: Any) -> bool:
    return getattr(state, "tp_passes", False)


def _post_backward(original: Any, self: Any, *unused: Any) -> None:
    runtime = current()
    if runtime is not None:
        runtime.replica_sums.flush()
    original(self, *unused)


def _fully_shard(original: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return original(module, *args, **kwargs)
    given = kwargs.get("mesh")
    if given is not None and (given.ndim > 1 or given.mesh.flatten().tolist() != list(mesh.data.ranks)):
        raise TPError(
            f"fully_shard was given {given}, but under tp_size the {mesh.dp_size} data-parallel ranks are "
            f"{list(mesh.data.ranks)}; leave out mesh (hybrid sharding, HSDP, is not supported)"
        )
    kwargs["mesh"] = given if given is not None else mesh.devices["data"]
    modules: list[Any] = list(module) if isinstance(module, list | tuple) else [module]
    before = _parameters(modules)
    if kwargs.get("shard_placement_fn") is not None:
        kwargs["shard_placement_fn"] = _by_rows(kwargs["shard_placement_fn"], before)
    absent = set()
    for name, parameter in before.items():
        layout = layout_of(parameter)
        if parameter.numel() or layout is None:
            continue
        absent.add(parameter)  # another pipeline stage has it
        if mesh.unit.rank not in layout.absent:
            raise TPError(
                f"tp_size leaves nothing of {name[1]!r} to this rank, which FSDP2 cannot split; lower tp_size"
            )
    if absent:
        kwargs["ignored_params"] = absent | set(kwargs.get("ignored_params") or ())
    result = original(module, *args, **kwargs)
    for name, parameter in _parameters(modules).items():
        if parameter is not before[name]:
            rebind(before[name], parameter)
    for part in modules:
        part.set_custom_all_gather(_counting("AllGather", mesh.data))
        part.set_custom_reduce_scatter(_counting("ReduceScatter", mesh.data))
    return result


def _parameters(modules: list[nn.Module]) -> dict[tuple[int, str], Any]:
    return {
        (at, name): parameter
        for at, module in enumerate(modules)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _by_rows(placement: Any, named: dict[tuple[int, str], Any]) -> Any:
    """``placement``, which may split dimension 0 only: norms, saving and loading count the rows that a rank holds."""
    names = {id(parameter): name for (_, name), parameter in named.items()}

    def checked(parameter: Any) -> Any:
        chosen = placement(parameter)
        dim = getattr(getattr(chosen, "placement", chosen), "dim", 0)
        if chosen is not None and dim != 0:
            raise TPError(
                f"shard_placement_fn splits dimension {dim} of {names.get(id(parameter), 'a parameter')!r}; "
                "with tp_size FSDP2 may split dimension 0 only: leave shard_placement_fn out, or let it return None or "
                "Shard(0)"
            )
        return chosen

    return checked


def _init_unsharded_param(original: Any, self: Any) -> None:
    made = not hasattr(self, "_unsharded_param")
    original(self)
    if made and current() is not None:
        rebind(self.sharded_param, self._unsharded_param)
        self._unsharded_param.tp_gathered = True  # it is there only while its modules run
        hook_replica_sum(self._unsharded_param)


def _full_tensor(original: Any, self: Any, **kwargs: Any) -> torch.Tensor:
    """What FSDP2 has split is gathered; it still is this TP rank's shard, and says so (TRL's head asks)."""
    info = info_of(self)
    if info is None:
        tensor: torch.Tensor = original(self, **kwargs)
        rebind(self, tensor)
        return tensor
    return as_global(original(local_of(self), **kwargs), info)


def _counting(kind: str, data: Group) -> Any:
    """FSDP2's own all-gather or reduce-scatter, counted like our own."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    default = getattr(_fsdp_collectives, f"Default{kind}")
    op = {"AllGather": "all_gather_into_tensor", "ReduceScatter": "reduce_scatter_tensor"}[kind]

    class Counted(default):  # type: ignore[misc]
        def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            data.record(op, input_tensor.numel() * input_tensor.element_size())
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    return Counted()
