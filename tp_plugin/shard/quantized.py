"""bitsandbytes linears in a sharded model: a rank keeps its part of the codes and of their scales.

Each weight is quantized whole and then cut, so what a rank decodes is the slice of what one process decodes, bit for
bit. Where the scales of a part could not be decoded alone, since their own scales belong to several ranks, they are
kept decoded, in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.policy import ParamLayout
from tp_plugin.policy.packed import EIGHT_BITS, block_size, groups_layout, is_packed, scales_layout

KINDS = ("Params4bit", "Int8Params")
"""The parameters' classes."""

STATISTICS = ("weight.absmax", "weight.nested_absmax", "SCB")
"""Names, in a state dict, of what decodes codes and can be cut as they are."""

PREFIX = "weight.quant_state.bitsandbytes__"
"""Of the entry of a state dict that has what is no tensor."""


@dataclass(frozen=True)
class Codes:
    """Stands on a linear as ``module.tp_codes``.

    Attributes:
        weight: the layout of its codes.
        statistics: the layouts of what decodes them, by their names in a state dict, of what is cut.
        nested: whether the scales of the whole weight are in codes, too.
    """

    weight: ParamLayout
    statistics: Mapping[str, ParamLayout]
    nested: bool = False


def is_code(parameter: object) -> bool:
    """Whether ``parameter`` is a weight in codes."""
    return type(parameter).__name__ in KINDS


def packed_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linears in codes, with their paths."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))


def entries(model: nn.Module) -> tuple[str, ...]:
    """With what the names begin that codes, and what decodes them, have in the state dict of ``model``."""
    return tuple(f"{path}.{what}" for path, _ in packed_in(model) for what in ("weight", "SCB"))


def statistics_of(module: Any) -> dict[str, torch.Tensor]:
    """What decodes the weight of ``module``, by its names in a state dict; the lookup tables are constants."""
    if type(module).__name__ == EIGHT_BITS:
        scales = vars(module.weight).get("SCB")
        scales = module.state.SCB if scales is None else scales
        if scales is None:
            raise TPError("an 8-bit weight has no scales yet; quantize it first (from_pretrained does, or .to(device))")
        return {"SCB": scales}
    state = state_of(module)
    found = {"weight.absmax": state.absmax}
    return found | {"weight.nested_absmax": state.state2.absmax, "offset": state.offset} if state.nested else found


def state_of(module: Any) -> Any:
    """The ``QuantState`` of a weight in 4 bits."""
    state = vars(module.weight).get("quant_state") or module.quant_state
    if state is None:
        raise TPError("a 4-bit weight has no scales yet; quantize it first (from_pretrained does, or .to(device))")
    if getattr(state, "packing_format_for_cpu", False):
        raise TPError(
            "a 4-bit weight was repacked by a forward without gradients on this CPU, which rounds its scales; set "
            "`module.support_avx512bf16_for_cpu = False` on its linears, or prepare the model before it is evaluated"
        )
    return state


def cut_statistics(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, ParamLayout]]:
    """Of a sharded model: what decodes this rank's codes and is cut as they are, with its name and layout."""
    for path, module in packed_in(model):
        codes: Codes | None = getattr(module, "tp_codes", None)
        if codes is not None:
            tensors = statistics_of(module)
            yield from ((f"{path}.{name}", tensors[name], layout) for name, layout in codes.statistics.items())


def whole_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What decodes the codes of a model that is not sharded yet."""
    return {
        f"{path}.{name}": tensor for path, module in packed_in(model) for name, tensor in statistics_of(module).items()
    }


@torch.no_grad()
def cut_(module: Any, layout: ParamLayout, rank: int) -> None:
    """Leave ``module`` the part of its codes that ``rank`` holds under ``layout``, and what decodes that."""
    if type(module).__name__ == EIGHT_BITS:
        _cut_8bit(module, layout, rank, module.weight.data, statistics_of(module)["SCB"])
    else:
        module.support_avx512bf16_for_cpu = False  # its forwards would lay out codes and scales anew
        _cut_4bit(module, layout, rank, module.weight.data, state_of(module))


@torch.no_grad()
def cut_from(module: Any, whole: Any, rank: int) -> None:
    """Cut ``module`` again, from another whole weight: a parameter like those that :func:`whole_weight` gives."""
    layout = module.tp_codes.weight
    if type(module).__name__ == EIGHT_BITS:
        _cut_8bit(module, layout, rank, whole.data, whole.SCB)
    else:
        _cut_4bit(module, layout, rank, whole.data, whole.quant_state)


@torch.no_grad()
def whole_weight(module: Any, gather: Callable[[torch.Tensor, ParamLayout], torch.Tensor]) -> Any:
    """The weight that ``module`` has a part of, as a parameter of bitsandbytes that no model has.

    Args:
        gather: gives the whole of what ranks hold under a layout, on this rank's device.
    """
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    codes: Codes = module.tp_codes
    found = {
        name: gather(tensor, codes.statistics[name]) if name in codes.statistics else tensor
        for name, tensor in statistics_of(module).items()
    }
    whole = gather(module.weight.data, codes.weight)
    if type(module).__name__ == EIGHT_BITS:
        return Int8Params(whole, requires_grad=False, CB=whole, SCB=found["SCB"])
    weight = module.weight
    return Params4bit(
        whole,
        requires_grad=False,
        quant_state=_whole_state(module, found),
        blocksize=weight.blocksize,
        compress_statistics=codes.nested,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        bnb_quantized=True,
    )


def _cut_8bit(module: Any, layout: ParamLayout, rank: int, whole: torch.Tensor, scales: torch.Tensor) -> None:
    weight = module.weight
    weight.data = layout.shard(whole, rank)
    rows = ParamLayout(layout.shape[:1], 0, layout.parts, absent=layout.absent) if layout.dim == 0 else None
    if layout.dim == 1 and layout.absent:  # whole on the ranks of a stage, and nowhere else
        held = tuple(((0, len(scales)),) if part else () for part in layout.parts)
        rows = ParamLayout(layout.shape[:1], 0, held, absent=layout.absent)
    weight.CB, weight.SCB = weight.data, scales if rows is None else rows.shard(scales, rank)
    module.state.CB = module.state.SCB = None
    module.tp_codes = Codes(layout, {} if rows is None else {"SCB": rows})


def _cut_4bit(module: Any, layout: ParamLayout, rank: int, whole: torch.Tensor, state: Any) -> None:
    features, block = layout.features, block_size(module)
    scales, groups = scales_layout(features, block), groups_layout(features, block)
    layouts: dict[str, ParamLayout] = {"weight.absmax": scales}
    kept: dict[str, Any] = {}
    absmax = state.absmax
    if state.nested and groups is not None:
        layouts["weight.nested_absmax"] = groups
        inner = type(state)(
            absmax=groups.shard(state.state2.absmax, rank),
            code=state.state2.code,
            blocksize=state.state2.blocksize,
            dtype=state.state2.dtype,
        )
        kept = {"offset": state.offset, "state2": inner}
    elif state.nested:
        absmax = decoded_scales(state)
    weight = module.weight
    weight.data = layout.shard(whole, rank)
    width = features.shape[1] if features.dim == 0 else scales.stored.local_shape(rank)[1] * block
    weight.quant_state = module.quant_state = type(state)(
        absmax=scales.shard(absmax, rank),
        shape=torch.Size((scales.stored.local_shape(rank)[0], width)),
        code=state.code,
        blocksize=block,
        quant_type=state.quant_type,
        dtype=state.dtype,
        **kept,
    )
    weight.compress_statistics = bool(kept)
    module.tp_codes = Codes(layout, layouts, bool(state.nested))


def decoded_scales(state: Any) -> torch.Tensor:
    """The scales in 32 bits, as bitsandbytes decodes them in front of each product."""
    from bitsandbytes.functional import dequantize_blockwise

    scales: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def give_whole(
    module: Any, state: dict[str, Any], prefix: str, whole: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Write into a state dict what decodes the whole weight of ``module``, as bitsandbytes writes it.

    Args:
        whole: gives the whole tensor of a name in the module and this rank's part.
    """
    codes: Codes | None = getattr(module, "tp_codes", None)
    if codes is None:
        return
    found = {name: whole(name, tensor) for name, tensor in statistics_of(module).items() if name in codes.statistics}
    if type(module).__name__ == EIGHT_BITS:
        state.update({prefix + name: tensor for name, tensor in found.items()})
        return
    full = _whole_state(module, found)
    state.update({f"{prefix}weight.{name}": tensor for name, tensor in full.as_dict(packed=True).items()})


def _whole_state(module: Any, found: Mapping[str, torch.Tensor]) -> Any:
    """The ``QuantState`` of the whole weight in 4 bits, from the whole scales, by their names in a state dict."""
    mine, codes = state_of(module), module.tp_codes
    inner = mine.state2
    if inner is not None:
        inner = type(inner)(
            found["weight.nested_absmax"], code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype
        )
    return type(mine)(
        absmax=found["weight.absmax"],
        shape=torch.Size(codes.weight.features.shape),
        code=mine.code,
        blocksize=mine.blocksize,
        quant_type=mine.quant_type,
        dtype=mine.dtype,
        offset=mine.offset,
        state2=inner,
    )


@torch.no_grad()
def take_whole(module: Any, state: dict[str, Any], prefix: str, rank: int) -> None:
    """Cut codes that a state dict has whole into this rank's; their entries are taken out of it.

    bitsandbytes itself loads none of 4 bits into a model that is there.
    """
    codes: Codes | None = getattr(module, "tp_codes", None)
    whole = state.get(f"{prefix}weight")
    if codes is None or whole is None or is_split(whole) or tuple(whole.shape) != codes.weight.shape:
        return
    if whole.data_ptr() == module.weight.data_ptr():  # a stage of one TP rank has it as it is
        return
    whole = whole.to(module.weight.device)
    if type(module).__name__ == EIGHT_BITS:
        scales = state.pop(f"{prefix}SCB", None)
        if scales is None:
            raise TPError(f"the state dict has {prefix}weight in codes, without what decodes them ({prefix}SCB)")
        _cut_8bit(module, codes.weight, rank, whole, scales.to(whole.device))
        state[f"{prefix}weight"] = module.weight.data
        return
    from bitsandbytes.functional import QuantState

    names = [name for name in state if name.startswith(f"{prefix}weight.")]
    if not any(name.startswith(prefix + PREFIX) for name in names):
        raise TPError(f"the state dict has {prefix}weight in codes, without what decodes them ({prefix}{PREFIX}…)")
    entries = {name.removeprefix(f"{prefix}weight."): state.pop(name) for name in names}
    _cut_4bit(module, codes.weight, rank, whole, QuantState.from_dict(entries, whole.device))
    state[f"{prefix}weight"] = module.weight.data
