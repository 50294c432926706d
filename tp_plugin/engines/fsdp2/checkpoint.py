"""Model and optimizer states through torch's distributed checkpoint API, by which Accelerate saves and loads FSDP2.

``full_state_dict``: whole tensors, as that option gives them without TP. Otherwise each rank's tensors are parts of
whole ones (chunks.py), which all ranks write and read in parallel.

A quantized base is left out: its codes are those that the script has loaded, and scales are no parameters, which torch
would ask for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_plugin.checkpoint.dcp_chunks import DCPShardView
from tp_plugin.engines.patching import wrap
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split, split_like
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.runtime import current_mesh, require
from tp_plugin.runtime.sync_points import BARRIER
from tp_plugin.shard import local_states
from tp_plugin.shard.full_tensor import gather_full_tensor
from tp_plugin.shard.params import plain_name
from tp_plugin.shard.quantized import entries
from tp_plugin.tensor.param_entry import layout_of

Leaf = Callable[[str, Any], Any]
"""``(parameter's name, value)`` → what stands in the value's place."""


def install(state_dict: Any) -> None:
    """Patch ``torch.distributed.checkpoint.state_dict``."""
    wrap(state_dict, "get_model_state_dict", _get_model)
    wrap(state_dict, "get_optimizer_state_dict", _get_optimizer)
    wrap(state_dict, "set_model_state_dict", _set_model)
    wrap(state_dict, "set_optimizer_state_dict", _set_optimizer)
    wrap(state_dict, "get_state_dict", _get_both(state_dict))
    wrap(state_dict, "set_state_dict", _set_both(state_dict))
    for what in ("model_state_dict", "optimizer_state_dict", "state_dict"):
        for name in (f"get_{what}", f"set_{what}"):
            wrap(state_dict, name, in_step)


class _Names:
    """Layouts and DTensors of a model's parameters, by the names that the state dicts have."""

    def __init__(self, model: nn.Module, mesh: Mesh):
        self.mesh = mesh
        require().sync_points.rendezvous(BARRIER)  # collectives follow: better an error here than a hang there
        with local_states():
            state = model.state_dict()  # also puts the parameters back that a forward has gathered
        self.split = {plain_name(name): v for name, v in state.items() if isinstance(v, torch.Tensor) and is_split(v)}
        parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        layouts = {name: layout_of(parameter) for name, parameter in parameters.items()}
        self.numbers = {name: id(parameter) for name, parameter in parameters.items()}
        whole = ParamLayout.replicated
        self.layouts = {name: layouts[name] or whole(v.shape, mesh.unit_size) for name, v in self.split.items()}
        known = {name: layout for name, layout in layouts.items() if layout is not None}
        self.absent = {name for name, layout in known.items() if mesh.unit.rank in layout.absent}
        """What is on other pipeline stages: FSDP2 has not split it, and the optimizer has no state of it."""
        self.layouts |= {name: known[name] for name in self.absent}
        self.of_codes = tuple(plain_name(name) for name in entries(model))
        """With what the names of codes, and of what decodes them, begin."""
        self.codes = {name: v for name, v in state.items() if plain_name(name) in self.of_codes}

    def is_share(self, name: str, value: torch.Tensor) -> bool:
        """Whether ``value`` is a part of something of the parameter's shape."""
        if name not in self.absent:
            return is_split(value)
        return tuple(value.shape) == self.layouts[name].local_shape(self.mesh.unit.rank)


def _names(model: nn.Module) -> _Names | None:
    """None if the model is not one that both groups have split."""
    mesh = current_mesh()
    split = mesh is not None and any(layout_of(p) is not None for p in model.parameters())
    return _Names(model, mesh) if split and any(_managed(m) for m in model.modules()) else None  # type: ignore[arg-type]


def _managed(module: nn.Module) -> bool:
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def _options(options: Any) -> tuple[Any, Any]:
    """The options (or the defaults), and those with which torch handles each rank's own."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = options or StateDictOptions()
    if options.flatten_optimizer_state_dict:
        raise TPError("flatten_optimizer_state_dict=True is incompatible with tp_size; leave it out")
    return options, replace(options, full_state_dict=False, broadcast_from_rank0=False, cpu_offload=False)


def _get_model(original: Any, model: nn.Module, *, submodules: Any = None, options: Any = None) -> Any:
    names = _names(model)
    if names is None:
        return original(model, submodules=submodules, options=options)
    _refuse_submodules(submodules)
    options, own = _options(options)
    with local_states():
        state = original(model, options=own)
    return _present(
        {name: {"": value} for name, value in state.items() if not (names.codes and name.startswith(names.of_codes))},
        names,
        options,
        lambda found: {name: values[""] for name, values in found.items()},
    )


def _get_optimizer(
    original: Any, model: nn.Module, optimizers: Any, *, submodules: Any = None, options: Any = None
) -> Any:
    names = _names(model)
    if names is None:
        return original(model, optimizers, submodules=submodules, options=options)
    _refuse_submodules(submodules)
    options, own = _options(options)
    groups = _groups(optimizers, names)
    with local_states(), _only_present(optimizers, names):
        state = original(model, optimizers, options=own)
    for group, of_all_stages in zip(state["param_groups"], groups, strict=True):
        group["params"] = of_all_stages
    mine = _of_all_stages(state["state"], names) if options.full_state_dict else state["state"]
    return _present(mine, names, options, lambda found: {**state, "state": found})


def _optimizers(optimizers: Any) -> list[torch.optim.Optimizer]:
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def _groups(optimizers: Any, names: _Names) -> list[list[str]]:
    """The names of each group's parameters, of all stages."""
    of = {number: name for name, number in reversed(names.numbers.items())}
    groups = [group for optimizer in _optimizers(optimizers) for group in optimizer.param_groups]
    return [[of[id(parameter)] for parameter in group["params"]] for group in groups]


@contextlib.contextmanager
def _only_present(optimizers: Any, names: _Names) -> Iterator[None]:
    """Inside, the optimizers have the parameters of this stage only: torch steps them once to make their state."""
    absent = {names.numbers[name] for name in names.absent}
    groups = [group for optimizer in _optimizers(optimizers) for group in optimizer.param_groups]
    kept = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in absent]
        yield
    finally:
        for group, parameters in zip(groups, kept, strict=True):
            group["params"] = parameters


def _of_all_stages(state: dict[str, dict[str, Any]], names: _Names) -> dict[str, dict[str, Any]]:
    """``state`` with empty tensors for the parameters of other stages, in one order on all ranks. Collective."""
    mesh = names.mesh
    if mesh.pp_size == 1:
        return state
    mine = {n: {key: v.dtype if is_split(v) else v for key, v in values.items()} for n, values in state.items()}
    known = {name: values for one in mesh.unit_cpu.gather_objects(mine) for name, values in one.items()}

    device = mesh.devices.device_type

    def empty(name: str, value: Any) -> Any:
        shape = names.layouts[name].local_shape(mesh.unit.rank)
        return torch.empty(shape, dtype=value, device=device) if isinstance(value, torch.dtype) else value

    order = [name for name in names.numbers if name in known]
    return {name: state.get(name) or {key: empty(name, v) for key, v in known[name].items()} for name in order}


def _refuse_submodules(submodules: Any) -> None:
    if submodules:
        raise TPError("submodules= of get_state_dict is incompatible with tp_size; take the whole model's state dict")


def _present(state: dict[str, dict[str, Any]], names: _Names, options: Any, finish: Callable[[Any], Any]) -> Any:
    mesh = names.mesh
    here = not (options.full_state_dict and options.cpu_offload) or mesh.data.rank == 0
    tied: dict[tuple[int, str], torch.Tensor] = {}  # gathered once, and still one tensor

    def present(name: str, key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not names.is_share(name, value):
            return value.cpu() if options.cpu_offload else value
        if options.full_state_dict:
            memory = names.numbers[name], key
            if memory not in tied:
                whole = gather_full_tensor(value, names.layouts[name], mesh, here)
                tied[memory] = whole if options.cpu_offload else whole.to(value.device)
            return tied[memory]
        return DCPShardView.of(value.cpu() if options.cpu_offload else value, names.layouts[name], mesh.unit.rank)

    found = {name: {key: present(name, key, value) for key, value in values.items()} for name, values in state.items()}
    if options.full_state_dict and options.cpu_offload and mesh.rank > 0:
        return {}  # as without TP
    return finish(found)


def _set_model(original: Any, model: nn.Module, model_state_dict: Any, *, options: Any = None) -> Any:
    names = _names(model)
    if names is None:
        return original(model, model_state_dict, options=options)
    options, own = _options(options)
    state = {name: {"": value} for name, value in (model_state_dict or {}).items()}
    _, state = _take(None, state, names, options)
    with local_states():
        return original(model, {**names.codes, **{n: values[""] for n, values in state.items()}}, options=own)


def _set_optimizer(
    original: Any, model: nn.Module, optimizers: Any, optim_state_dict: Any, *, options: Any = None
) -> None:
    names = _names(model)
    if names is None:
        return original(model, optimizers, optim_state_dict, options=options)  # type: ignore[no-any-return]
    options, own = _options(options)
    given = optim_state_dict or {}
    rest, state = _take({k: v for k, v in given.items() if k != "state"}, given.get("state", {}), names, options)
    state = {name: values for name, values in state.items() if name not in names.absent}
    with local_states(), _only_present(optimizers, names):
        return original(model, optimizers, {**rest, "state": state}, options=own)  # type: ignore[no-any-return]


def _take(rest: Any, state: dict[str, dict[str, Any]], names: _Names, options: Any) -> tuple[Any, Any]:
    """Each rank's own state, from parts, or from whole tensors that all ranks have or only the first ones do."""
    mesh = names.mesh
    if not options.full_state_dict:
        return rest, {name: {k: _own(names, name, v) for k, v in values.items()} for name, values in state.items()}
    from_first = options.broadcast_from_rank0 and mesh.dp_size > 1
    first = not from_first or mesh.data.rank == 0
    spread = first and not all(mesh.unit_cpu.gather_objects(bool(state)))
    outline = {name: {key: _outline(names, name, v) for key, v in values.items()} for name, values in state.items()}
    if spread:
        rest, outline = mesh.unit_cpu.broadcast_object((rest, outline))
    if from_first:
        rest, outline = mesh.data.broadcast_object((rest, outline))

    def receive(name: str, key: str, stands: Any) -> Any:
        if not isinstance(stands, _Whole):
            return stands
        layout = names.layouts[name]
        shape = layout.local_shape(mesh.unit.rank)
        if name in names.absent:
            if first and spread:
                mesh.unit_cpu.broadcast(_or_empty(state, name, key, layout, stands).cpu().contiguous())
            return torch.empty(shape, dtype=stands.dtype, device=mesh.devices.device_type)
        like = names.split[name]
        if not first:
            local = torch.empty(shape, dtype=stands.dtype, device=like.device)
        else:
            whole = _or_empty(state, name, key, layout, stands)
            if spread:
                whole = mesh.unit_cpu.broadcast(whole.cpu().contiguous())
            local = layout.shard(whole, mesh.unit.rank).to(like.device).contiguous()
        return split_like(mesh.data.broadcast(local) if from_first else local, like)

    return rest, {n: {key: receive(n, key, stands) for key, stands in vs.items()} for n, vs in outline.items()}


def _or_empty(state: Any, name: str, key: str, layout: ParamLayout, stands: _Whole) -> torch.Tensor:
    found: torch.Tensor = state[name][key] if state else torch.empty(layout.shape, dtype=stands.dtype, device="cpu")
    return found


class _Whole:
    """Stands for a whole tensor that is sent by itself."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def _outline(names: _Names, name: str, value: Any) -> Any:
    layout = names.layouts.get(name)
    whole = isinstance(value, torch.Tensor) and layout is not None and tuple(value.shape) == layout.shape
    return _Whole(value.dtype) if whole else value


def _own(names: _Names, name: str, value: Any) -> Any:
    return value.tp_local if isinstance(value, DCPShardView) else value


def _get_both(module: Any) -> Any:
    def get(original: Any, model: Any, optimizers: Any, *, submodules: Any = None, options: Any = None) -> Any:
        if current_mesh() is None:
            return original(model, optimizers, submodules=submodules, options=options)
        return (
            module.get_model_state_dict(model, submodules=submodules, options=options),
            module.get_optimizer_state_dict(model, optimizers, submodules=submodules, options=options),
        )

    return get


def _set_both(module: Any) -> Any:
    def set_(
        original: Any, model: Any, optimizers: Any, *, model_state_dict: Any, optim_state_dict: Any, options: Any = None
    ) -> Any:
        if current_mesh() is None:
            return original(
                model,
                optimizers,
                model_state_dict=model_state_dict,
                optim_state_dict=optim_state_dict,
                options=options,
            )
        module.set_optimizer_state_dict(model, optimizers, optim_state_dict, options=options)
        return module.set_model_state_dict(model, model_state_dict, options=options)

    return set_
