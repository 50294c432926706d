"""What each of torch's functions does with tensors that look whole."""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.mesh.dtensor_utils import held, is_split
from tp_plugin.tensor.global_view import attributes, elementwise, on_whole, tables
from tp_plugin.tensor.global_view.info import as_global, info_of, local_of
from tp_plugin.tensor.global_view.operands import locally, made, tensors_in
from tp_plugin.tensor.global_view.view import GlobalView
from tp_plugin.tensor.global_view.whole import read_alone, reduce, shard_of
from tp_plugin.tensor.graphs import disable, refuse_tracer


class Calls:
    """How many functions were dispatched in this process: none inside a step."""

    count = 0


@disable
def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``function``, of whose arguments some look whole, or are views of such."""
    refuse_tracer()
    Calls.count += 1
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return attributes.access(function, name, getattr(function.__self__, "__name__", ""), args)
    given = list(tensors_in((args, kwargs)))
    has_shards = any(info_of(value) is not None for value in given)
    if name.startswith("new_") and is_split(args[0]):  # of another shape: on this rank, like any new tensor
        return locally(function, (held(args[0]), *args[1:]), kwargs)
    if name in tables.LOCAL or not (has_shards or any(isinstance(value, GlobalView) for value in given)):
        return locally(function, args, kwargs)
    if name == "grad" and getattr(function, "__module__", "") == "torch.autograd":
        return _gradients(function, args, kwargs)
    if name.startswith("_foreach_"):
        return elementwise.call_foreach(function, name, args, kwargs)
    done = NotImplemented
    if has_shards and elementwise.is_elementwise(name):
        done = elementwise.call(function, args, kwargs)
    elif args and (info := info_of(args[0])) is not None:
        if name in attributes.ABOUT:
            return attributes.ABOUT[name](*args, **kwargs)
        if name in tables.REDUCTIONS:
            done = _reduce(function, name, args, kwargs)
        elif name in tables.RANDOM:  # every rank of the unit draws the same whole
            whole = function(on_whole.empty(args[0], info), *args[1:], **kwargs)
            return as_global(shard_of(whole, info, local_of(args[0])), made(info, None))
    elif name in tables.SHAPE_OF_OTHER and len(args) == 2 and not isinstance(args[0], GlobalView):
        return getattr(args[0], tables.SHAPE_OF_OTHER[name])(args[1].shape)
    return on_whole.call(function, name, args, kwargs) if done is NotImplemented else done


def _reduce(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """One number of all elements; NotImplemented for a dimension's, and where gradients need more than numbers."""
    tensor, rest = args[0], args[1:]
    info = attributes.known(tensor)
    asked = {key: value for key, value in kwargs.items() if value is not None and value is not False}
    order: Any = 2.0
    if name in ("norm", "linalg_vector_norm"):
        order = rest[0] if rest else asked.get("p", asked.get("ord", 2.0))
        order = 2.0 if order in (None, "fro") else order
        plain = len(rest) <= 1 and set(asked) <= {"p", "ord"} and not isinstance(order, str)
    else:
        plain = not rest and set(asked) <= ({"dtype"} if name in ("sum", "mean") else set())
    recorded = local_of(tensor).requires_grad and torch.is_grad_enabled()
    extreme = name in ("max", "min", "amax", "amin") or order in (float("inf"), float("-inf"))
    if not plain or is_split(tensor) or (recorded and extreme):
        return NotImplemented
    if not info.peers.meet(f"{name} of {info.name}"):
        return function(read_alone(tensor, info), *rest, **kwargs)
    return reduce(name, tensor, info, float(order), asked.get("dtype"))


def _gradients(function: Any, args: Any, kwargs: Any) -> Any:
    """``torch.autograd.grad``: gradients of what looks whole look whole."""
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    info = next(info for given in tensors_in((args, kwargs)) if (info := info_of(given)) is not None)
    infos = [info_of(given) for given in inputs]
    with info.peers.step():  # parameters are ordinary in it; deferred logits go on being what they are
        still = any(info_of(given) is not None for given in tensors_in((args, kwargs)))
        found = locally(function, args, kwargs) if still else function(*args, **kwargs)
    return tuple(
        grad if grad is None or seen is None else as_global(grad, seen.of_gradient())
        for grad, seen in zip(found, infos, strict=True)
    )
