"""An optimizer of a sharded model: state built earlier is sliced, and its ``state_dict`` is that of the whole model."""

from __future__ import annotations

import itertools
import weakref
from types import MethodType
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split, split_like
from tp_plugin.policy import ParamLayout
from tp_plugin.runtime.published import ELSEWHERE
from tp_plugin.runtime.runtime import Runtime
from tp_plugin.shard import block_states, full_matrix_step
from tp_plugin.shard.elementwise import fault
from tp_plugin.shard.model_state import read_full_tensor
from tp_plugin.shard.replicas import agree_on
from tp_plugin.shard.state_form import StateForm, form
from tp_plugin.tensor.global_view import local_of
from tp_plugin.tensor.global_view.view import GlobalView, plain_of
from tp_plugin.tensor.param_entry import entry_of, layout_of

_uids = itertools.count()

NOT_ELEMENTWISE = ("Adafactor", "Muon", "LBFGS", "Shampoo", "SOAP", "LAMB", "Lamb", "LARS", "Adalayer")
"""Optimizers that use more of a tensor than one element at a time; on a shard they would compute something else."""


def shard_optimizer(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    """Fit ``optimizer`` to parameters that were sharded after it was built; a second call does nothing.

    What it holds beside them is made equal over the unit, which is one process. Collective over the unit.

    Raises:
        TPError: its update rule is not elementwise, so shards would not train as the whole tensor does, and it is none
            of those that are given whole parameters (full_matrix_step.py).
    """
    with runtime.region.step():
        _shard_optimizer(optimizer, runtime)


def _shard_optimizer(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    if getattr(optimizer, "tp_states", None) is not None or getattr(optimizer, "tp_full_matrices", False):
        return
    parameters = _parameters(optimizer)
    if not any((layout := layout_of(p)) is not None and layout.is_sharded for p in parameters):
        return
    # of modules that were never prepared (a loss's own classifier): each rank may have drawn its own
    others = {str(at): p for at, p in enumerate(parameters) if entry_of(p) is None and not is_split(p)}
    agree_on(others, runtime.mesh)
    if full_matrix_step.needs_full_matrices(optimizer):
        full_matrix_step.install(optimizer, runtime.mesh.unit)
        optimizer.tp_full_matrices = True  # type: ignore[attr-defined]
        return
    _take_over(optimizer, runtime)


def _take_over(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    """Cut the state that it has, and let its ``state_dict`` be that of the whole model from now on."""
    _refuse_unfit(optimizer)
    if block_states.keeps_blocks(optimizer):  # whose load_state_dict calls no hook of torch's
        block_states.fit(optimizer)
        optimizer.load_state_dict = MethodType(_load_state_dict, optimizer)  # type: ignore[method-assign]
    else:
        optimizer.register_load_state_dict_pre_hook(_take_shards)
    rank = runtime.mesh.unit.rank
    for parameter in _parameters(optimizer):
        layout = layout_of(parameter)
        if layout is None or not (layout.is_sharded or is_split(parameter)):
            continue
        state = optimizer.state.get(parameter, {})
        if block_states.is_coded(state):
            state.update(block_states.mine(state, layout, rank))
            continue
        for key, value in state.items():
            state[key] = value = local_of(plain_of(value) if isinstance(value, GlobalView) else value)
            if isinstance(value, torch.Tensor) and not is_split(value) and tuple(value.shape) == layout.shape:
                mine = layout.shard(value, rank)
                state[key] = split_like(mine, parameter) if is_split(parameter) else mine
    optimizer.tp_states = OptimizerStates(optimizer, runtime)  # type: ignore[attr-defined]
    optimizer.register_state_dict_post_hook(_give_full)


def _load_state_dict(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    states = {at: block_states.unnested(state) for at, state in state_dict["state"].items()}
    type(self).load_state_dict(self, _take_shards(self, {**state_dict, "state": states}), *args, **kwargs)


def check_unprepared(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    """At the first step of an optimizer that was prepared by nobody: it is fitted as a prepared one.

    Raises:
        TPError: shards would not train as the whole does.
    """
    if hasattr(optimizer, "tp_states") or hasattr(optimizer, "tp_full_matrices"):
        return
    if not any((layout := layout_of(p)) is not None and layout.is_sharded for p in _parameters(optimizer)):
        return
    if full_matrix_step.needs_full_matrices(optimizer):
        raise TPError(
            f"optimizer {type(optimizer).__name__} looks at whole matrices, and steps with shards of them: pass it to "
            "accelerator.prepare, which gives it whole ones"
        )
    with runtime.region.step():
        _take_over(optimizer, runtime)


def _refuse_unfit(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("torchao.") and hasattr(optimizer, "block_size"):
        raise TPError(
            f"{block_states.name_of(optimizer)} keeps its state in 8 bits or less, in tensors of torchao's own, which "
            'tp_size does not save whole. Use that of bitsandbytes (optim="adamw_8bit"), a 32-bit optimizer '
            "(adamw_torch_fused), or tp_size: 1"
        )
    if name in NOT_ELEMENTWISE:
        raise TPError(
            f"optimizer {name} looks at whole tensors (rows, columns or norms), which no rank holds under "
            "tensor parallelism; its numbers would be others. Use an elementwise one such as AdamW, or Adafactor of "
            "transformers or torch, or tp_size: 1"
        )
    if why := fault(optimizer):
        raise TPError(why)


class OptimizerStates:
    """What other ranks may read of an optimizer: its state tensors, by ``"<parameter index>/<state key>"``."""

    def __init__(self, optimizer: torch.optim.Optimizer, runtime: Runtime):
        self.runtime = runtime
        self._optimizer = weakref.ref(optimizer)
        self.uid = f"optimizer{next(_uids)}"
        self.retain()
        runtime.published.publish(self.uid, self)

    def retain(self) -> None:
        """Hold parameters and state, not the optimizer: load_state_dict and add_param_group replace them."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._parameters, self._state = _parameters(optimizer), optimizer.state

    def alive(self) -> bool:
        """Whether the script still holds the optimizer."""
        return self._optimizer() is not None

    def clock(self) -> object:
        """Steps taken, summed over the parameters, and the number of state tensors."""
        self.retain()
        values = [v for p in self._parameters for v in self._state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        steps = [float(s["step"]) for p in self._parameters if "step" in (s := self._state.get(p, {}))]
        return sum(steps), len(values)

    def is_at(self, theirs: object) -> bool:
        """Whether this rank's states are of the same step as those of a rank whose clock is ``theirs``."""
        return self.clock() == theirs

    def explain_mismatch(self, theirs: object) -> str:
        """Why a rank whose clock is ``theirs`` cannot read here."""
        return ELSEWHERE

    def local(self, key: str) -> torch.Tensor:
        """This rank's state tensor."""
        index, name = key.split("/", 1)
        # another thread asks, and this one may be in the script's region, where the tensor looks whole
        return local_of(self._state[self._parameters[int(index)]][name])  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a pickled optimizer leaves its connections behind


def _nothing() -> None:
    return None


def _ordinary(value: Any) -> Any:
    """What this rank holds, without what the script's view has noted on it, which does not pickle."""
    if is_split(value):
        return value
    return local_of(value).detach() if hasattr(value, "tp_global") else value


def _give_full(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    mine = {at: {key: _ordinary(value) for key, value in state.items()} for at, state in state_dict["state"].items()}
    state_dict = {**state_dict, "state": mine}
    if form() is StateForm.LOCAL:
        return state_dict
    states: OptimizerStates = optimizer.tp_states  # type: ignore[attr-defined]
    runtime = states.runtime
    runtime.sessions.enter(states.uid)
    full: dict[int, Any] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if index not in state_dict["state"]:
            continue
        layout = layout_of(parameter)
        entry = dict(state_dict["state"][index])
        if layout is not None and layout.is_sharded and block_states.is_coded(entry):

            def read(key: str, layout: ParamLayout, index: int = index, entry: dict[str, Any] = entry) -> torch.Tensor:
                return read_full_tensor(runtime, states.uid, f"{index}/{key}", entry[key], layout)

            full[index] = block_states.whole(entry, layout, read)
            continue
        for key, value in entry.items():
            if layout is None or not layout.is_sharded or not isinstance(value, torch.Tensor) or is_split(value):
                continue  # (FSDP2's states become whole in torch's distributed checkpoint API)
            if tuple(value.shape) == layout.local_shape(runtime.mesh.unit.rank):
                entry[key] = read_full_tensor(runtime, states.uid, f"{index}/{key}", value, layout)
        full[index] = entry
    runtime.sessions.leave(states.uid)
    return {**state_dict, "state": full}


def _take_shards(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    states: OptimizerStates = optimizer.tp_states  # type: ignore[attr-defined]
    rank = states.runtime.mesh.unit.rank
    state = dict(state_dict["state"])
    for index, parameter in enumerate(_parameters(optimizer)):
        layout = layout_of(parameter)
        if layout is None or not layout.is_sharded or index not in state:
            continue
        if block_states.is_coded(state[index]):
            state[index] = block_states.mine(state[index], layout, rank)
            continue
        state[index] = {
            key: layout.shard(value, rank)
            if isinstance(value, torch.Tensor) and not is_split(value) and tuple(value.shape) == layout.shape
            else local_of(value)
            for key, value in state[index].items()
        }
    return {**state_dict, "state": state}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
