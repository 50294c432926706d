"""What ``tp-plugin plan`` says a rank holds, against real runs on the CPU as its allocator counts.

All architectures and pairs: ci/bench/plan_memory.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from measured import measured
from predicted import predicted
from workers import run

WORST = 0.05
# layers enough that a hidden state or two, which the runtime holds until its next collective, are no more than noise
WIDE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "use_cache": False}
CASES: dict[str, tuple[Any, ...]] = {
    "llama": (1, 2, "ddp", "llama", WIDE, False, ""),
    "qwen3, tp": (2, 1, "none", "qwen3", {**WIDE, "head_dim": 32}, False, ""),
    "adapters, tp": (2, 1, "none", "llama", WIDE, False, "lora"),
    "experts": (1, 2, "ddp", "mixtral", {**WIDE, "head_dim": 32}, False, ""),
    "partial rotary, ZeRO 1": (1, 2, "zero1", "gpt_neox", {**WIDE, "max_position_embeddings": 256}, False, ""),
    "ZeRO 3, adapters": (1, 2, "zero3", "gemma2", {**WIDE, "head_dim": 32, "sliding_window": 64}, False, "lora"),
    "FSDP2": (1, 2, "fsdp2", "phi3", WIDE, False, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_run(name: str) -> None:
    tp, dp, engine, architecture, overrides, checkpointing, adapter = CASES[name]
    given = architecture, overrides, 4, 128, checkpointing, adapter
    real, said = run(tp * dp, measured, tp, engine, *given)[0], predicted(tp, dp, engine, *given)
    compared = ["weights", "gradients", "optimizer", "activations", *(["peak"] if engine in ("ddp", "none") else [])]
    for part in compared:
        assert said[part] == pytest.approx(real[part], rel=WORST), (part, real, said)


def test_sequence_parallel_run() -> None:
    given = "llama", WIDE, 4, 128
    real = run(2, measured, 2, "none", *given, False, "", True)[0]
    said = predicted(2, 1, "none", *given, sequence_parallel=True)
    for part in ("weights", "gradients", "optimizer", "activations", "peak"):
        assert said[part] == pytest.approx(real[part], rel=WORST), (part, real, said)
