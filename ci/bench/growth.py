#!/usr/bin/env python
"""How a rank's memory and traffic grow with layers, sequence and vocabulary at tp = 1, 2, 4, against the formulas.

One rank alone (alone.py) takes a training step; every storage is counted while it lives, so the figures are exact and
the same on every machine. The formulas and their sources: formulas.py.

    python ci/bench/growth.py              # writes ci/bench/results/growth.json and growth.md; fails outside LIMITS
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

LIMITS = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.001, "activations": 0.02, "head": 0.25, "bytes": 0.0}
"""Largest relative deviations from the formulas. The head's is the room for its temporaries."""

BASE = {"layers": 2, "hidden": 256, "inner": 688, "heads": 8, "groups": 4, "vocabulary": 4096}
BATCH, TOKENS = 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth")
    args = parser.parse_args()
    rows = []
    for change in ({}, {"layers": 4}, {"layers": 8}, {"tokens": 256}, {"tokens": 512}, {"vocabulary": 16384}):
        for tp in (1, 2, 4):
            rows.append(measure(tp, **{"tokens": TOKENS, **BASE, **change}))
    for tp in (2, 4):
        rows.append(measure(tp, **{"tokens": TOKENS, **BASE}, sequence_parallel=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    text = markdown(rows)
    args.out.with_suffix(".md").write_text(text)
    print(text)
    outside = [(row["case"], name) for row in rows for name, limit in LIMITS.items() if not _fits(row, name, limit)]
    sys.exit(f"outside of the formulas: {outside}" if outside else 0)


def _fits(row: dict[str, Any], name: str, limit: float) -> bool:
    found, expected = row[name]
    if name == "head" and row["tp"] == 1:
        return True  # transformers' own
    return bool(found <= expected * (1 + limit) and (name == "head" or found >= expected * (1 - limit)))


def measure(tp: int, tokens: int, sequence_parallel: bool = False, **size: int) -> dict[str, Any]:
    """One step of rank 0: measured and expected bytes of each kind."""
    import alone
    import torch
    from counted import ledger
    from formulas import Llama, on_the_wire
    from memory import LiveBytes
    from transformers import LlamaConfig, LlamaForCausalLM

    import tp_plugin
    from tp_plugin.config.keys import ENV_OPTIONS

    torch.set_num_threads(1)
    os.environ[ENV_OPTIONS] = json.dumps({"sequence_parallel": sequence_parallel})
    llama = Llama(**size)
    config = LlamaConfig(
        vocab_size=llama.vocabulary, hidden_size=llama.hidden, intermediate_size=llama.inner, use_cache=False,
        num_hidden_layers=llama.layers, num_attention_heads=llama.heads, num_key_value_heads=llama.groups,
        attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    alone.enter(tp)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    if tp > 1:
        tp_plugin.parallelize(model, tp_size=tp)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, llama.vocabulary, (BATCH, tokens))
    for book in ledger.values():
        book.clear()
    model(input_ids=ids, labels=ids).loss.backward()
    sent = {key: count for key, count in ledger["bytes"].items() if key.endswith("/tp")}
    optimizer.step()
    states = [state for states in optimizer.state.values() for state in states.values()]
    found = {
        "case": f"{llama.layers} layers, {tokens} tokens, vocabulary {llama.vocabulary}"
        + (", sequence parallel" if sequence_parallel else ""),
        "tp": tp,
        "parameters": (_bytes(list(model.parameters())), 4 * llama.parameters(tp)),
        "gradients": (_bytes([p.grad for p in model.parameters() if p.grad is not None]), 4 * llama.parameters(tp)),
        "optimizer": (_bytes(states), 8 * llama.parameters(tp)),
        "bytes": (on_the_wire(sent, tp), 4 * llama.sent(BATCH, tokens, tp, sequence_parallel)),
    }
    del states, optimizer
    model.zero_grad()

    x = torch.randn(BATCH, tokens, llama.hidden, requires_grad=True)
    with LiveBytes(tuple(model.parameters())) as live:
        model.loss_function(model.lm_head(x), ids, vocab_size=llama.vocabulary).backward()
    # beside the logits: the gradients of the weight and of the input, the latter here and summed
    rest = llama.vocabulary * llama.hidden // tp + (2 if tp > 1 else 1) * x.numel()
    found["head"] = (live.peak, 4 * (llama.local_logits(BATCH, tokens, tp) + rest))
    del model, x

    kept = []
    for layers in (1, 2):
        config.num_hidden_layers = layers
        model = LlamaForCausalLM(config).train()
        if tp > 1:
            tp_plugin.parallelize(model, tp_size=tp)
        with LiveBytes(tuple(model.parameters())) as live:
            output = model.model(input_ids=ids)
            gc.collect()  # what stands in cycles is not kept
            kept.append(live.live)
        del output, model
    found["activations"] = (kept[1] - kept[0], 4 * llama.kept_by_layer(BATCH, tokens, tp, sequence_parallel))
    return found


def _bytes(tensors: list[Any]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    names = list(LIMITS)
    lines = [
        "# How a rank's memory and traffic grow",
        "",
        f"Llama, width {BASE['hidden']}, batch {BATCH}, fp32, one training step; measured MB (and to the formula). "
        "Activations: of one layer. Head: peak of head and loss, forward and backward; at tp 1 transformers' own. "
        "Bytes: sent by a rank, in rings. Formulas: ci/bench/formulas.py.",
        "",
        "| case | tp | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 2),
    ]
    for row in rows:
        cells = [f"{found / 1e6:.2f} ({found / want:.3f})" if want else "0" for found, want in (row[n] for n in names)]
        lines.append(f"| {row['case']} | {row['tp']} | " + " | ".join(cells) + " |")
    limits = ", ".join(f"{name} {limit:.1%}" for name, limit in LIMITS.items())
    return "\n".join([*lines, "", f"Limits of the deviations: {limits} (head: above only, and not at tp 1).", ""])


if __name__ == "__main__":
    main()
