"""Run by test_vocab_kernels.py in a process of its own, in Triton's interpreter: kernels against the reference.

Prints the largest deviation of each case as JSON, relative to the largest entry of the reference.
"""

from __future__ import annotations

import itertools
import json

import torch

from tp_plugin.tensor.vocab import kernels, triton_kernels

ROWS, FIRST = 5, 700
LABELS = torch.tensor([3, 700, 1011, 1899, 5000])  # of another rank, first, inside, far off
SIZES = (1, 131, 4096 + 1200)


def deviation(found: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isinf(), want.isinf()), (found, want)
    assert torch.equal(found[want.isinf()], want[want.isinf()])
    usual = want.isfinite()
    scale = want[usual].double().abs().max().clamp_min(1e-6)
    return ((found[usual].double() - want[usual].double()).abs().max() / scale).item()


def block_of(width: int, dtype: torch.dtype, odd: str) -> torch.Tensor:
    """Columns of a wider tensor, as blocks are."""
    block = (torch.randn(ROWS, width + 3) * 4).to(dtype)[:, 2 : 2 + width]
    if odd == "masked":
        block[1] = -torch.inf
        block[2, : width // 2] = -torch.inf
    if odd == "not a number":
        block[3, width // 2] = torch.nan
    return block


def statistics(width: int, dtype: torch.dtype, odd: str, count: int) -> float:
    block = block_of(width, dtype, odd)
    labels = None if count == 2 else LABELS
    columns = (FIRST, FIRST + width)
    found, want = (torch.zeros(count, ROWS + 2)[:, 1:-1] for _ in range(2))
    triton_kernels.row_statistics(block, labels, FIRST, found)
    kernels.row_statistics(block, labels, columns, want)
    if odd == "not a number":
        found[0], want[0] = 0, 0  # the maximum of such a row is whatever it is: its sum says so
        assert found[1, 3].isnan() and want[1, 3].isnan()
        found[1, 3] = want[1, 3] = 0
    return deviation(found, want)


def gradient(width: int, dtype: torch.dtype, out_dtype: torch.dtype, count: int, in_place: bool) -> float:
    block = block_of(width, dtype, "")
    log_sum, *weights = (torch.randn(ROWS, 1) + 5, *(torch.randn(ROWS, 1) for _ in range(count)))
    labels = LABELS.unsqueeze(-1) if count > 1 else None
    weights += [None] * (3 - count)
    columns = (FIRST, FIRST + width)
    want = kernels.statistics_gradient(block, log_sum, labels, *weights, columns=columns, dtype=out_dtype)
    out = block if in_place else torch.full((ROWS, width), torch.nan, dtype=out_dtype)
    triton_kernels.statistics_gradient(block, log_sum, labels, *weights, FIRST, out)
    return deviation(out, want)


if __name__ == "__main__":
    torch.manual_seed(0)
    triton_kernels.try_on(torch.device("cpu"))
    results = {}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for case in itertools.product(SIZES, dtypes, ("", "masked", "not a number"), (2, 3, 4)):
        results[f"statistics {case}"] = statistics(*case)
    for width, dtype, count in itertools.product(SIZES, dtypes, (1, 2, 3)):
        for out_dtype, in_place in ((torch.float32, False), (torch.bfloat16, False), (dtype, True)):
            results[f"gradient {width, dtype, out_dtype, count, in_place}"] = gradient(
                width, dtype, out_dtype, count, in_place
            )
    print(json.dumps(results))
