#!/usr/bin/env python
"""A whole rank of Llama-3-8B at tp 8 on one card: forward, loss, backward, clipping and AdamW, with all checks on.

The other ranks are PyTorch's fake process group (alone.py). By sequence length: wall time of a step against the time in
which the card ran kernels, how many kernels, how often the host waited for the card (``torch.cuda`` warns of each), and
the peak of memory.

    python ci/bench/gpu_rank.py                           # on a card
    python ci/bench/gpu_rank.py --device cpu --tiny       # the same lines without one
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import alone  # noqa: E402
import torch  # noqa: E402
from formulas import Llama  # noqa: E402

LLAMA_8B = Llama(layers=32, hidden=4096, inner=14336, heads=32, groups=8, vocabulary=128256)
TINY = Llama(layers=2, hidden=128, inner=256, heads=16, groups=8, vocabulary=1000)
WARM, ROUNDS = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--tokens", default="", help="default 1024,2048,4096,8192; tiny 16,32")
    args = parser.parse_args()
    lengths = [int(length) for length in (args.tokens or ("16,32" if args.tiny else "1024,2048,4096,8192")).split(",")]
    alone.enter(args.tp)
    step = Step(TINY if args.tiny else LLAMA_8B, args.tp, torch.device(args.device), max(lengths))
    found = {length: measure(step, length) for length in lengths}
    for length, result in found.items():
        print(f"{length} tokens: {json.dumps(result)}")
    print(json.dumps({"tokens": found, "layers": step.layers}))


class Step:
    """A training step of one rank."""

    def __init__(self, llama: Llama, tp: int, device: torch.device, longest: int):
        from transformers import LlamaConfig, LlamaForCausalLM

        import tp_plugin

        config = LlamaConfig(
            vocab_size=llama.vocabulary, hidden_size=llama.hidden, intermediate_size=llama.inner, use_cache=False,
            num_hidden_layers=llama.layers, num_attention_heads=llama.heads, num_key_value_heads=llama.groups,
            attn_implementation="sdpa", max_position_embeddings=longest, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with device:
            self.model = LlamaForCausalLM(config).train()
        torch.set_default_dtype(torch.float32)
        tp_plugin.parallelize(self.model, tp_size=tp)
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, **fused)
        self.device, self.layers, self.vocabulary = device, llama.layers, llama.vocabulary

    def batch(self, tokens: int) -> dict[str, torch.Tensor]:
        """As a loader gives it: on the host, sent to the card."""
        ids = torch.randint(0, self.vocabulary, (1, tokens))
        ids = ids.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else ids
        return {"input_ids": ids, "labels": ids}

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(step: Step, tokens: int) -> dict[str, Any]:
    """Figures of steps at one length."""
    cuda = step.device.type == "cuda"
    batches = [step.batch(tokens) for _ in range(WARM + ROUNDS + 2)]
    for batch in batches[:WARM]:
        step(batch)
    _wait(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for batch in batches[WARM : WARM + ROUNDS]:
        started = time.perf_counter()
        step(batch)
        _wait(cuda)
        seconds.append(time.perf_counter() - started)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        step(batches[-2])
        _wait(cuda)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "milliseconds": 1000 * statistics.median(seconds),
        "busy milliseconds": sum(event.device_time for event in kernels) / 1000 if cuda else None,
        "kernels": len(kernels) if cuda else None,
        "host waits": _host_waits(step, batches[-1]) if cuda else None,
        "peak bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def _host_waits(step: Step, batch: dict[str, torch.Tensor]) -> list[str]:
    """Where a step waited for the card, by file and line, as torch's debug mode warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(batch)
    torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
