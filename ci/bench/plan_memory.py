#!/usr/bin/env python
"""Memory that ``tp-plugin plan`` predicts against real runs on the CPU, as its allocator counts (tests/measured.py).

Architectures × tp 1, 2, 4, and of engines, checkpointing and LoRA for each some, so that every pair comes up.

    python ci/bench/plan_memory.py              # writes ci/bench/results/plan_memory.json; fails outside of the limits
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

WIDE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "use_cache": False,
        "max_position_embeddings": 256}  # fmt: skip
GPT = {"vocab_size": 512, "n_embd": 128, "n_layer": 4, "n_positions": 256, "use_cache": False}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": {**WIDE, "head_dim": 32},
    "gemma2": {**WIDE, "head_dim": 32, "sliding_window": 64},
    "phi3": WIDE,
    "mixtral": {**WIDE, "head_dim": 32},
    # heads of one width: with others the CPU has no fused attention
    "deepseek_v3": {**WIDE, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "gpt_neox": WIDE,
    "falcon": WIDE,
    "gpt2": GPT,
    "opt": {**WIDE, "ffn_dim": 256, "word_embed_proj_dim": 128},
    "bloom": {"vocab_size": 512, "hidden_size": 128, "n_layer": 4, "use_cache": False},
    "bert": WIDE,
}
WITH_LORA = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "bloom")
"""Whose policies take adapters on all linears at any tp."""
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SIZE, LENGTH = 4, 128
PARTS = ("weights", "gradients", "optimizer", "activations")
MEDIAN, WORST = 0.02, 0.05


def cases() -> list[tuple[Any, ...]]:
    """(tp, dp, engine, architecture, checkpointing, adapter)."""
    found = []
    for number, architecture in enumerate(ARCHITECTURES):
        for turn, (tp, dp) in enumerate(((1, 2), (2, 2), (4, 1))):
            for flag in (0, 1):
                engine = "none" if dp == 1 else ENGINES[(number + 2 * turn + flag) % len(ENGINES)]
                adapter = "lora" if architecture in WITH_LORA and (number + turn + flag) % 2 else ""
                found.append((tp, dp, engine, architecture, bool(flag), adapter))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan_memory.json")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    from measured import measured
    from predicted import predicted
    from workers import WorkerError, run

    from tp_plugin.errors import TPError

    rows: list[dict[str, Any]] = []
    for tp, dp, engine, architecture, checkpointing, adapter in sorted(cases(), key=lambda c: (c[0] * c[1], c)):
        if args.only and args.only != architecture:
            continue
        name = f"{architecture} tp {tp} {engine}{' checkpointing' * checkpointing}{' ' * bool(adapter) + adapter}"
        given = architecture, ARCHITECTURES[architecture], SIZE, LENGTH, checkpointing, adapter
        try:
            real = run(tp * dp, measured, tp, engine, *given)[0]
            said = predicted(tp, dp, engine, *given)
        except (WorkerError, RuntimeError, TPError) as error:
            rows.append({"case": name, "failed": str(error)[-300:]})
            print(name, "FAILED", str(error)[-300:].replace("\n", " "), flush=True)
            continue
        rows.append({"case": name, "measured": real, "predicted": said})
        print(name, " ".join(f"{part} {said[part] / max(real[part], 1):.3f}" for part in real), flush=True)
    errors = [abs(r["predicted"][p] / r["measured"][p] - 1) for r in rows if "measured" in r for p in PARTS]
    total = {"figures": len(errors), "median": statistics.median(errors), "worst": max(errors)}
    args.out.write_text(json.dumps({"total": total, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(total, rows))
    print(total)
    sys.exit(f"outside of {MEDIAN:.0%} and {WORST:.0%}" if total["median"] > MEDIAN or total["worst"] > WORST else 0)


def markdown(total: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# Predicted memory of our own runs",
        "",
        f"CPU, fp32, {SIZE} x {LENGTH} tokens, as the allocator counts; predicted to measured. Of "
        f"{total['figures']} figures "
        f"(without the peaks) the median deviation is {total['median']:.2%}, the worst {total['worst']:.1%}; "
        f"goals: {MEDIAN:.0%} and {WORST:.0%}. Peaks of engines are without their buckets and gathered weights.",
        "",
        "| run | " + " | ".join((*PARTS, "peak")) + " |",
        "|" + "---|" * (len(PARTS) + 2),
    ]
    for row in rows:
        if "measured" not in row:
            lines.append(f"| {row['case']} | did not run |" + " |" * len(PARTS))
            continue
        cells = [f"{row['predicted'][p] / max(row['measured'][p], 1):.3f}" for p in (*PARTS, "peak")]
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
