"""The two passes over a rank's logits that a cross-entropy needs: numbers of each row, and the gradient.

Each is one Triton kernel where there is Triton for the device, and else some functions of torch on the block: these
are the reference. Both add in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch

from tp_plugin.tensor.vocab.expr import add_one_hot, take
from tp_plugin.tensor.vocab.vocabulary import Columns

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def triton_for(kind: str) -> Any:
    """The module of Triton kernels for devices of this kind; None if the reference runs there."""
    if kind not in ("cuda", "xpu") or importlib.util.find_spec("triton") is None:
        return None
    try:
        module = importlib.import_module("tp_plugin.tensor.vocab.triton_kernels")
        module.try_on(torch.device(kind))
    except Exception as error:  # no C compiler for its launchers, no support for this device: whatever it raises
        logger.warning("Triton is installed but does not run here (%s); the loss is computed by torch", error)
        return None
    return module


def _triton(dtype: torch.dtype, sums: torch.dtype, device: torch.device) -> Any:
    return triton_for(device.type) if dtype in _DTYPES and sums == torch.float32 else None


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes products in on devices of this kind, if it is on; the meta device knows no autocast."""
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def cost(dtype: torch.dtype, sums: torch.dtype, device: torch.device) -> int:
    """Bytes of temporaries for each element of a block in ``dtype``, beside the result, if ``sums`` is what adds it."""
    if _triton(dtype, sums, device) is not None:
        return 0
    return sums.itemsize if dtype == sums else 2 * sums.itemsize


def finite(highest: torch.Tensor) -> torch.Tensor:
    """What exponentials are relative to: of entries that are all -inf (or of none) their sum is 0 in any case."""
    return highest.clamp_min(torch.finfo(highest.dtype).min)


def row_statistics(block: torch.Tensor, labels: torch.Tensor | None, columns: Columns, found: torch.Tensor) -> None:
    """Write what is known of each row of a block (rows, columns) into ``found`` (2, 3 or 4, rows).

    That is the largest entry, the sum of exponentials relative to it, the entry at the label (zero if another rank has
    it), the sum.
    """
    triton = _triton(block.dtype, found.dtype, block.device)
    if triton is not None and block.stride(-1) == 1:
        triton.row_statistics(block, labels, columns[0], found)
        return
    block = block.to(found.dtype)
    torch.amax(block, -1, out=found[0])
    if labels is not None:
        found[2] = take(block, labels.unsqueeze(-1), columns).squeeze(-1)
    if len(found) == 4:
        torch.sum(block, -1, out=found[3])
    torch.sum((block - finite(found[0]).unsqueeze(-1)).exp_(), -1, out=found[1])


def statistics_gradient(
    block: torch.Tensor,
    log_sum: torch.Tensor,
    labels: torch.Tensor | None,
    of_log_sum: torch.Tensor,
    of_entry: torch.Tensor | None = None,
    of_sum: torch.Tensor | None = None,
    *,
    columns: Columns,
    dtype: torch.dtype,
    in_place: bool = False,
) -> torch.Tensor:
    """The gradient of a block in ``dtype``, from those of a row's log-sum-exp, its entry at the label, and its sum.

    Args:
        in_place: the block is nobody else's, so that the gradient may take its memory.
        log_sum, labels, of_log_sum, of_entry, of_sum: (rows, 1).
    """
    in_place = in_place and block.dtype == dtype
    triton = _triton(block.dtype, log_sum.dtype, block.device)
    if triton is not None and block.stride(-1) == 1 and dtype in _DTYPES:
        out = block if in_place else torch.empty(block.shape, dtype=dtype, device=block.device)
        triton.statistics_gradient(block, log_sum, labels, of_log_sum, of_entry, of_sum, columns[0], out)
        return out
    found = block.sub_(log_sum) if in_place and dtype == log_sum.dtype else block.to(log_sum.dtype) - log_sum
    found.exp_().mul_(of_log_sum)
    if of_sum is not None:
        found.add_(of_sum)
    if labels is not None and of_entry is not None:
        add_one_hot(found, labels, of_entry, columns)
    return found.to(dtype)
