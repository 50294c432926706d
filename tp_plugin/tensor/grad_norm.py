"""Which layout a live parameter has, and norms that count every element of the whole model once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from tp_plugin.mesh.dtensor_utils import held, held_rows, is_split
from tp_plugin.mesh.groups import Group, current_mesh
from tp_plugin.policy import ParamLayout

_layouts: Any = WeakIdKeyDictionary()


def attach(parameter: torch.nn.Parameter, layout: ParamLayout) -> None:
    """Remember that ``parameter`` holds this rank's share under ``layout``.

    Sets ``tensor_model_parallel``, the attribute by which Megatron-LM and DeepSpeed know sharded parameters.
    """
    _layouts[parameter] = layout
    parameter.tensor_model_parallel = layout.is_sharded  # type: ignore[attr-defined]


def layout_of(parameter: torch.Tensor) -> ParamLayout | None:
    """The layout of a parameter of a sharded model, else None."""
    layout: ParamLayout | None = _layouts.get(parameter)
    return layout


def is_nameless_share(tensor: torch.Tensor) -> bool:
    """Whether ``tensor``, which has no layout, has the shape of a rank's rows of a vocabulary: a copy, most likely."""
    shares = {layout for layout in _layouts.values() if layout.pad_to is not None and layout.dim == 0}
    return any(tuple(tensor.shape) == layout.local_shape(0) != layout.shape for layout in shares)


def owned_part(tensor: torch.Tensor, layout: ParamLayout, rank: int) -> list[torch.Tensor]:
    """Views of the elements of a local tensor that count for ``rank``: the first holder of each element owns it."""
    assert layout.dim is not None
    ranges, rows = layout.owned(rank), held_rows(tensor)
    tensor = held(tensor)
    if rows is not None and layout.dim == 0:
        start, stop = rows
        ranges = tuple((max(a, start) - start, min(b, stop) - start) for a, b in ranges if a < stop and b > start)
    if ranges == ((0, tensor.shape[layout.dim]),):
        return [tensor]
    return [tensor.narrow(layout.dim, a, b - a) for a, b in ranges]


@functools.lru_cache(maxsize=256)
def not_owned(layout: ParamLayout, rank: int) -> torch.Tensor | None:
    """Flat mask of the elements of a shard that another rank counts; None if this rank owns them all."""
    assert layout.dim is not None
    shape = layout.local_shape(rank)
    owned = layout.owned(rank)
    if owned == ((0, shape[layout.dim]),) or not math.prod(shape):
        return None
    mask = torch.ones(shape, dtype=torch.bool)
    for a, b in owned:
        mask.narrow(layout.dim, a, b - a).fill_(False)
    return mask.reshape(-1)


def any_sharded() -> bool:
    """Whether this process holds a sharded parameter, and is still in its groups."""
    return len(_layouts) > 0 and current_mesh() is not None


def total_norm(tensors: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """:func:`sharded_grad_norm` in the dtype of the gradients, as torch's own norm is given."""
    tensors = list(tensors)
    norm = sharded_grad_norm(tensors, norm_type)
    return norm.to(functools.reduce(torch.promote_types, (t.dtype for t in tensors))) if tensors else norm


def sharded_grad_norm(tensors: list[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The ``norm_type`` norm of whole gradients (or parameters), each seen as its whole tensor; a scalar tensor.

    ``tensors`` are what this rank holds, recognised as parameters, their ``.grad``, or views of the same memory.
    Sharded ones are summed over the TP group, replicated ones and replicas counted once. One all-reduce of one number
    (two for an infinite norm); its result is the same on every rank of the group to the last bit. What FSDP2 has split
    by rows is summed over the DP group first, by another one.
    """
    mesh = current_mesh()
    assert mesh is not None
    if not tensors:
        return torch.tensor(0.0)
    layouts = _recognise(tensors)
    counted: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # by whether the DP group has split it
    for tensor, layout in zip(tensors, layouts, strict=True):
        if layout is not None and layout.is_sharded:
            counted[is_split(tensor)] += owned_part(tensor, layout, mesh.tp.rank)
        elif mesh.is_leader:
            counted[is_split(tensor)].append(held(tensor))
    device, wide = held(tensors[0]).device, _wide(tensors[0]) or tensors[0].dtype
    infinite, largest = math.isinf(norm_type), norm_type > 0

    def together(values: torch.Tensor) -> torch.Tensor:
        return values.sum() if not infinite else values.max() if largest else values.min()

    def local(mine: list[torch.Tensor]) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(t, norm_type, dtype=_wide(t)).to(device) for t in mine if t.numel()]
        if not norms:
            return torch.full((), math.inf if infinite and not largest else 0.0, dtype=wide, device=device)
        values = torch.stack(norms).to(wide)
        return together(values if infinite else values.pow(norm_type))

    def over(group: Group, value: torch.Tensor) -> torch.Tensor:
        return extreme(value, largest, group) if infinite else group.all_reduce(value)

    total = local(counted[False])
    if any(is_split(tensor) for tensor in tensors):
        total = together(torch.stack([total, over(mesh.dp, local(counted[True]))]))
    # gradients that FSDP2 has offloaded lie on the host
    total = over(mesh.tp if total.device.type != "cpu" or mesh.tp.takes_host else mesh.control, total)
    return total if infinite else total.pow(1.0 / norm_type)


def extreme(value: torch.Tensor, largest: bool, group: Group) -> torch.Tensor:
    """The largest (or the least) of the ranks' scalars, NaN if one is: a backend's MAX may lose it on some ranks."""
    signed = value if largest else -value
    pair = torch.stack([signed.nan_to_num(-math.inf, math.inf, -math.inf), value.isnan().to(value.dtype)])
    most, nans = group.all_reduce(pair, dist.ReduceOp.MAX)
    return torch.where(nans > 0, math.nan, most if largest else -most)


def _wide(tensor: torch.Tensor) -> torch.dtype | None:
    # sums of squares of 16-bit gradients are taken in fp32, so that 1 and tp ranks round alike
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None


def _recognise(tensors: list[torch.Tensor]) -> list[ParamLayout | None]:
    by_id: dict[int, ParamLayout] = {}
    by_memory: dict[tuple[int, int], ParamLayout] = {}
    for parameter, layout in _layouts.items():
        for tensor in (parameter, parameter.grad):
            if tensor is not None:
                by_id[id(tensor)] = layout
                by_memory[held(tensor).data_ptr(), tensor.numel()] = layout
    return [by_id.get(id(t)) or by_memory.get((held(t).data_ptr(), t.numel())) for t in tensors]
