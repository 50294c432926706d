#!/usr/bin/env python
"""The two passes of cross-entropy over a rank's logits: Triton's kernels against the functions of torch.

Llama-3-8B's vocabulary at tp 8: 16032 columns, bf16. Time, largest difference, and the bytes that a pass takes beside
the logits.

    python ci/bench/gpu_loss.py                           # on a card
    python ci/bench/gpu_loss.py --device cpu --tiny       # the same lines without one: there both are torch's
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402

from tp_plugin.tensor.vocab import kernels  # noqa: E402

WARM, ROUNDS = 3, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    rows, columns = (64, 500) if args.tiny else (8192, 16032)
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(3).bfloat16().to(args.device)
    labels = torch.randint(-columns, columns, (rows,), generator=torch.Generator().manual_seed(1)).to(args.device)
    found: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "triton runs": kernels.triton_for(args.device) is not None,
    }
    results = {}
    for name in ("triton", "torch"):
        reference = unittest.mock.patch.object(kernels, "triton_for", lambda kind: None)
        with reference if name == "torch" else contextlib.nullcontext():
            statistics_of, gradient_of = passes(logits, labels, columns)
            results[name] = statistics_of(), gradient_of()
            found[name] = {"forward": timed(statistics_of, args.device), "backward": timed(gradient_of, args.device)}
    for at, kind in enumerate(("forward", "backward")):
        one, other = (results[name][at].float().nan_to_num() for name in ("triton", "torch"))
        found[f"{kind} apart"] = ((one - other).abs().max() / other.abs().max()).item()
    print(json.dumps(found))
    sys.exit(0 if found["forward apart"] <= 1e-5 and found["backward apart"] <= 1e-2 else 1)


def passes(logits: torch.Tensor, labels: torch.Tensor, columns: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What each row's numbers are computed by, and the gradient."""
    ours = (0, columns)

    def statistics_of() -> torch.Tensor:
        found = torch.zeros(3, len(logits), dtype=torch.float32, device=logits.device)
        kernels.row_statistics(logits, labels, ours, found)
        return found

    highest, total, _ = statistics_of()
    log_sum = (highest + total.log()).unsqueeze(-1)
    scale = torch.full_like(log_sum, 1 / len(logits))

    def gradient_of() -> torch.Tensor:
        return kernels.statistics_gradient(
            logits, log_sum, labels.unsqueeze(-1), scale, -scale, columns=ours, dtype=logits.dtype
        )

    return statistics_of, gradient_of


def timed(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Median milliseconds, and the most bytes at one time beside what was there before, result included."""
    cuda = device == "cuda"
    seconds = []
    for turn in range(WARM + ROUNDS):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        if turn >= WARM:
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {"milliseconds": 1000 * statistics.median(seconds), "bytes": peak}


if __name__ == "__main__":
    main()
