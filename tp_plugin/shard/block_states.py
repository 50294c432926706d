"""bitsandbytes' optimizers of a sharded model: states in 8 bits have one scale for each block of 256 elements.

Blocks are cut per shard. Which parameters have such states is decided by the size of the whole parameter. A state is
saved as that of the whole tensor: where a rank's blocks are blocks of the whole tensor, its scales are put in their
places; elsewhere the state is decoded and coded anew in the blocks of the whole, and what the ranks had is kept beside
it, for the layout that it was saved in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout
from tp_plugin.policy.state_blocks import one_after_another, replicas_agree, scales_layout
from tp_plugin.tensor.param_entry import entry_of, layout_of

BLOCK = 256
"""Elements that share a scale (``bitsandbytes.optim.optimizer``: ``blocksize``)."""

CODED = (("state1", "absmax1", "qmap1"), ("state2", "absmax2", "qmap2"))
"""Codes of a state, their scales, and the value of each code."""

BY_RANK = "tp_plugin_by_rank"
"""What the ranks had, in a saved state: codes and scales of one rank after another, its layout and step."""

NESTED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes puts the tensors of a state when it saves them."""

ELEMENTWISE = {"max_unorm": 0.0, "percentile_clipping": 100, "block_wise": True}
"""Options of bitsandbytes (of releases before, too) with which an update looks at nothing but a block."""

Read = Callable[[str, ParamLayout], torch.Tensor]


def keeps_blocks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` is one of bitsandbytes', which may keep states in 8 bits."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("bitsandbytes.")]
    return any(kind.__name__ == "Optimizer8bit" for kind in kinds)


def has_codes(optimizer: Any) -> bool:
    """Whether ``optimizer`` keeps the states of large parameters in 8 bits."""
    return keeps_blocks(optimizer) and optimizer.args.optim_bits == 8


def fit(optimizer: Any) -> None:
    """Let ``optimizer``, one of bitsandbytes', step with shards.

    Raises:
        TPError: it looks at whole tensors, or ranks that hold the same elements would code them otherwise.
    """
    if optimizer.optimizer_name == "ademamix":
        raise TPError(
            f"{name_of(optimizer)} keeps two moments in one tensor, which tp_size cannot save whole. Use AdamW8bit "
            '(optim="adamw_8bit"), or torch\'s AdamW, or tp_size: 1'
        )
    for at, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            _check(optimizer, parameter, _config(optimizer, at, number, group))
    optimizer.get_config = MethodType(_config, optimizer)
    optimizer.update_step = MethodType(_update_step, optimizer)


def _config(self: Any, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
    """What bitsandbytes and the script say of a parameter; its size is that of the whole parameter."""
    found: dict[str, Any] = type(self).get_config(self, gindex, pindex, group)
    parameter = group["params"][pindex]
    _refuse_whole_options(self, found)
    layout = layout_of(parameter)
    if layout is not None and layout.is_sharded:
        is_small = math.prod(layout.shape) < found["min_8bit_size"]
        found["min_8bit_size"] = parameter.numel() + 1 if is_small else 0
    return found


def _update_step(self: Any, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
    if not p.numel():  # it is on another pipeline stage
        self.state[p]["step"] += 1
        return
    type(self).update_step(self, group, p, gindex, pindex)
    layout = layout_of(p)
    if layout is not None and layout.dim is not None and layout.pad_to is not None:
        # not every kernel's code of zero is that of zero: without a gradient, too, an element moves a little
        held = sum(b - a for a, b in layout.parts[self.tp_states.runtime.mesh.unit.rank])
        p.narrow(layout.dim, held, p.shape[layout.dim] - held).zero_()


def _check(optimizer: Any, parameter: torch.Tensor, config: dict[str, Any]) -> None:
    layout, entry = layout_of(parameter), entry_of(parameter)
    if layout is None or entry is None or not layout.is_sharded:
        return
    is_coded = config["optim_bits"] == 8 and parameter.numel() >= config["min_8bit_size"]
    if is_coded and scales_layout(layout, BLOCK) is None and not replicas_agree(layout):
        raise TPError(
            f"{name_of(optimizer)} would keep the state of {entry.name} in blocks of {BLOCK} elements that differ on "
            "ranks which hold the same part of it, so that they would train it apart. Keep it in 32 bits "
            "(GlobalOptimManager.override_config(parameter, 'optim_bits', 32)), or take a tp_size that divides its "
            "key/value heads"
        )


def _refuse_whole_options(optimizer: Any, config: dict[str, Any]) -> None:
    for option, value in ELEMENTWISE.items():
        if config.get(option, value) != value:
            raise TPError(
                f"{name_of(optimizer)} with {option}={config[option]} looks at whole tensors, which no rank holds "
                f'under tensor parallelism. Use AdamW8bit (optim="adamw_8bit"), {option}={value}, or tp_size: 1'
            )


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """``optimizer`` for a message."""
    return f"optimizer {type(optimizer).__module__}.{type(optimizer).__name__}"


def is_coded(state: dict[str, Any]) -> bool:
    """Whether ``state``, that of one parameter, is in codes."""
    return "absmax1" in state


def unnested(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` without the level that bitsandbytes puts in when it saves."""
    return {**{key: value for key, value in state.items() if key != NESTED}, **state.get(NESTED, {})}


def whole(state: dict[str, Any], layout: ParamLayout, read: Read) -> dict[str, Any]:
    """The state of the whole parameter, of which this rank's is ``state``.

    Args:
        read: gives the whole tensor of a key, of which each rank has a part.
    """
    found, by_rank = dict(state), {}
    for codes, scales, qmap in CODED:
        if codes not in state:
            continue
        aligned = scales_layout(layout, BLOCK)
        if aligned is not None:
            found[codes], found[scales] = read(codes, layout), read(scales, aligned)
            continue
        of_codes, of_scales = _by_rank(layout)
        by_rank[codes], by_rank[scales] = held = read(codes, of_codes), read(scales, of_scales)
        code = state[qmap].cpu()
        shards = [
            _decode(of_codes.shard(held[0], rank).view(layout.local_shape(rank)), of_scales.shard(held[1], rank), code)
            for rank in range(layout.ranks)
        ]
        found[codes], found[scales] = _encode(layout.gather(shards), code)
    return found | ({BY_RANK: {**by_rank, "step": state["step"], "layout": _mark(layout)}} if by_rank else {})


def mine(state: dict[str, Any], layout: ParamLayout, rank: int) -> dict[str, Any]:
    """The state of what ``rank`` holds, of the whole parameter's ``state``; the inverse of :func:`whole`."""
    found = {key: value for key, value in state.items() if key != BY_RANK}
    by_rank = state.get(BY_RANK)
    if by_rank is not None and (by_rank["step"] != state["step"] or by_rank["layout"] != _mark(layout)):
        by_rank = None  # another layout's, or a process without tp_size has trained on
    shape = layout.local_shape(rank)
    for codes, scales, qmap in CODED:
        if codes not in state:
            continue
        aligned = scales_layout(layout, BLOCK)
        if aligned is not None:
            found[codes], found[scales] = layout.shard(state[codes], rank), aligned.shard(state[scales], rank)
        elif by_rank is not None:
            of_codes, of_scales = _by_rank(layout)
            found[codes] = of_codes.shard(by_rank[codes], rank).view(shape)
            found[scales] = of_scales.shard(by_rank[scales], rank)
        else:
            decoded = _decode(state[codes], state[scales], state[qmap])
            found[codes], found[scales] = _encode(layout.shard(decoded, rank), state[qmap])
    return found


def _by_rank(layout: ParamLayout) -> tuple[ParamLayout, ParamLayout]:
    """How codes and scales lie one rank after another."""
    sizes = [layout.local_numel(rank) for rank in range(layout.ranks)]
    return one_after_another(sizes), one_after_another(-(-size // BLOCK) for size in sizes)


def _mark(layout: ParamLayout) -> tuple[Any, ...]:
    return layout.parts, layout.pad_to or 0


def _decode(codes: torch.Tensor, scales: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=qmap.to(codes.device), blocksize=BLOCK)


def _encode(values: torch.Tensor, qmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(values, code=qmap.to(values.device), blocksize=BLOCK)
    return codes, state.absmax
