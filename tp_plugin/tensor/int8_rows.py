"""Row-parallel ``Linear8bitLt`` where it quantizes activations: each token by its largest feature, of all ranks.

bitsandbytes multiplies in 8 bits on a GPU, and on a CPU in evaluation (autograd/_functions.py, MatMul8bitLt). The scale
of a token is the largest of all its features that are no outliers, of which a rank has a part; one all-reduce of a
number per token makes it that of one process. Outliers are columns, and each is on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.mesh.groups import Group
from tp_plugin.policy.packed import EIGHT_BITS, is_packed
from tp_plugin.tensor.first_order import first_order


def quantizes_input(module: Any, x: torch.Tensor) -> bool:
    """Whether ``module`` multiplies in 8 bits here."""
    if not is_packed(module) or type(module).__name__ != EIGHT_BITS:
        return False
    return not (module.training and x.device.type in ("cpu", "xpu"))


def product(module: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's features (…, in / tp) times its codes, without the bias."""
    if module.weight.CB is not None:
        module.init_8bit_state()
    found: torch.Tensor = _SharedScale.apply(x, module.state, group)
    return found


class _SharedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, state: Any, group: Group) -> torch.Tensor:
        ctx.state = state
        rows = x.reshape(-1, x.shape[-1])
        halves = rows.to(torch.float16)
        features = halves.abs()
        if state.threshold > 0:
            features = features.masked_fill(features >= state.threshold, 0)
        largest = group.all_reduce(features.amax(1, keepdim=True).float(), dist.ReduceOp.MAX)
        # as one more feature, it is what the kernel finds as the largest
        codes, scales, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
            torch.cat([halves, largest.to(torch.float16)], 1), state.threshold
        )
        codes = codes[:, :-1].contiguous()
        if state.threshold > 0:
            out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                rows, codes, state.CB, scales, state.SCB, outliers, None
            )
        else:
            out = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, state.CB, scales, state.SCB, dtype=x.dtype)
        return out.reshape(*x.shape[:-1], state.CB.shape[0])  # type: ignore[no-any-return]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        state = ctx.state
        weight = state.CB.to(grad.dtype) * (state.SCB.unsqueeze(1) * (1.0 / 127.0))
        return grad @ weight.to(grad.dtype), None, None
