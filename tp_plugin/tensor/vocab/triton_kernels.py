"""Triton kernels of :mod:`.kernels`, which alone imports this: one program for each row, or part of a row."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Columns that a program reads at once."""


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    block,
    labels,
    found,
    width,
    first,
    block_stride,
    found_stride,
    HAS_LABELS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    line = block + row.to(tl.int64) * block_stride
    highest = float("-inf")
    total = 0.0
    plain = 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(line + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of entries that are all -inf the sum is 0
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(values - base), 0)
        highest = higher
        if HAS_SUM:
            plain += tl.sum(tl.where(at < width, values, 0.0), 0)
    tl.store(found + row, highest)
    tl.store(found + found_stride + row, total)
    if HAS_LABELS:
        place = tl.load(labels + row) - first
        inside = (place >= 0) & (place < width)
        entry = tl.load(line + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(found + 2 * found_stride + row, entry)
    if HAS_SUM:
        tl.store(found + 3 * found_stride + row, plain)


@triton.jit
def _statistics_gradient(  # type: ignore[no-untyped-def]
    block,
    out,
    log_sum,
    labels,
    of_log_sum,
    of_entry,
    of_sum,
    width,
    first,
    block_stride,
    out_stride,
    HAS_ENTRY: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(block + row.to(tl.int64) * block_stride + at, mask=at < width, other=0.0).to(tl.float32)
    found = tl.exp(values - tl.load(log_sum + row)) * tl.load(of_log_sum + row)
    if HAS_SUM:
        found += tl.load(of_sum + row)
    if HAS_ENTRY:
        found += tl.where(at == tl.load(labels + row) - first, tl.load(of_entry + row), 0.0)
    tl.store(out + row.to(tl.int64) * out_stride + at, found.to(out.dtype.element_ty), mask=at < width)


def row_statistics(block: torch.Tensor, labels: torch.Tensor | None, first: int, found: torch.Tensor) -> None:
    """:func:`.kernels.row_statistics` of a block whose columns begin at ``first`` and lie side by side."""
    rows, width = block.shape
    with _current(block.device):
        _row_statistics[(rows,)](
            block,
            None if labels is None else labels.contiguous(),
            found,
            width,
            first,
            block.stride(0),
            found.stride(0),
            HAS_LABELS=labels is not None,
            HAS_SUM=len(found) == 4,
            BLOCK=_block(width),
            num_warps=8,
        )


def statistics_gradient(
    block: torch.Tensor,
    log_sum: torch.Tensor,
    labels: torch.Tensor | None,
    of_log_sum: torch.Tensor,
    of_entry: torch.Tensor | None,
    of_sum: torch.Tensor | None,
    first: int,
    out: torch.Tensor,
) -> None:
    """:func:`.kernels.statistics_gradient`, written into ``out``, which may be ``block`` itself."""
    rows, width = block.shape
    size = _block(width)
    per_row = [None if each is None else each.contiguous() for each in (log_sum, labels, of_log_sum, of_entry, of_sum)]
    with _current(block.device):
        _statistics_gradient[(rows, triton.cdiv(width, size))](
            block,
            out,
            *per_row,
            width,
            first,
            block.stride(0),
            out.stride(0),
            HAS_ENTRY=labels is not None and of_entry is not None,
            HAS_SUM=of_sum is not None,
            BLOCK=size,
            num_warps=8,
        )


def try_on(device: torch.device) -> None:
    """Compile and run both on a single element."""
    block, per_row = torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device)
    row_statistics(block, None, 0, torch.zeros(2, 1, device=device))
    statistics_gradient(block, per_row, None, per_row, None, None, 0, block)


def _block(width: int) -> int:
    size: int = min(BLOCK, triton.next_power_of_2(width))
    return size


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":  # its interpreter
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
