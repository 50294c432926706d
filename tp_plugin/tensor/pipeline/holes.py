"""What stands in the forward of a module that is on another stage.

A layer elsewhere passes the hidden state on. At the last one before this stage's own layers the stage receives, at the
first one after them its output is taken: never in an own layer, so that checkpointing and compilation do not see it.

A module before or after the layers gives zeros of stride zero, of the shape that its twin on the meta device finds:
masks, positions and whatever else the model computes by itself are computed on every stage.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tp_plugin.errors import TPError
from tp_plugin.policy.packed import is_packed
from tp_plugin.tensor.graphs import disable


def meta_twin(module: nn.Module) -> Any:
    """A copy of a module's structure, whose tensors are shapes on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(shape, requires_grad=shape.is_floating_point())
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    packed = [one for one in module.modules() if is_packed(one)]
    for one in packed:  # what decodes their weights is not copied
        memo |= {id(value): value for value in (vars(one).get("quant_state"), vars(one).get("state"))}
    twin: Any = copy.deepcopy(module, memo)
    for one in twin.modules():
        if is_packed(one):
            one.forward = functools.partial(_of_shape, one.out_features)
    return twin


def _of_shape(features: int, input: torch.Tensor) -> torch.Tensor:
    """What a linear gives on the meta device: its codes cannot be decoded there."""
    return input[..., :1].expand(*input.shape[:-1], features) * 1


class AbsentModule:
    """Stands in the forward of a module before or after the layers; made while its parameters have their shapes.

    Args:
        path: of the module.
        is_running: whether a pipelined forward runs.
    """

    def __init__(self, path: str, module: nn.Module, is_running: Callable[[], bool]):
        self._path, self._is_running = path, is_running
        self._twin = meta_twin(module)
        self._twin.requires_grad_(False)

    @disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check(self._path, self._is_running())
        device = next(_tensors((args, kwargs))).device
        on_meta = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, kwargs))
        with torch.no_grad():
            found = self._twin(*on_meta[0], **on_meta[1])
        casts = isinstance(self._twin, nn.Linear) and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if casts else None
        return tree_map_only(torch.Tensor, lambda tensor: _zeros(tensor, device, dtype), found)


class AbsentLayer:
    """Stands in the forward of a layer.

    Args:
        path: of the layer.
        is_running: whether a pipelined forward runs.
        number: of the layer, by which caches know it.
        returns_tuple: whether the layer returns a tuple.
        pass_on: what becomes of the hidden state.
    """

    def __init__(
        self,
        path: str,
        is_running: Callable[[], bool],
        number: int,
        returns_tuple: bool,
        pass_on: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._path, self._is_running = path, is_running
        self._number, self._returns_tuple, self._pass_on = number, returns_tuple, pass_on

    @disable
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _check(self._path, self._is_running())
        cache = kwargs.get("past_key_values") or kwargs.get("layer_past")
        if cache is None:
            cache = next((value for value in args if hasattr(value, "get_seq_length")), None)
        if cache is not None and hasattr(cache, "update"):  # its length is read: a byte per token
            rows, tokens = hidden_states.shape[:2]
            mark = torch.zeros(rows, 1, tokens, 1, dtype=torch.int8, device=hidden_states.device)
            cache.update(mark, mark, self._number)
        hidden_states = self._pass_on(hidden_states)
        return (hidden_states,) if self._returns_tuple else hidden_states


def _check(path: str, is_running: bool) -> None:
    if not is_running:
        raise TPError(
            f"{path} was called by itself, but lies on another pipeline stage; call the whole model, or write "
            "pp_size: 1"
        )


def _zeros(shape: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.zeros((), dtype=dtype or shape.dtype, device=device).expand(shape.shape)


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
