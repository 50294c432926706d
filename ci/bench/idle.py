#!/usr/bin/env python
"""What the installed plugin costs who does not use it: with ``tp_size: 1``, and without the key at all.

Three processes train the same small Llama and take turns (A B C, B C A, …): the plugin switched off, installed but not
asked for, and at ``tp_size: 1``. Compared are medians of the CPU time of a step, which what else the machine does
disturbs least. Then the proof: in none of them is anything patched, hooked or imported that is the plugin's.

    python ci/bench/idle.py                # writes ci/bench/results/idle.json and idle.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS: dict[str, dict[str, str]] = {
    "plain": {"TP_PLUGIN_DISABLE": "1"},
    "installed": {},
    "tp_size: 1": {"TP_PLUGIN_TP_SIZE": "1"},
}
IMPORT = """
import json, os, sys, time, importlib.metadata  # torch imports these itself
started = time.process_time()
from tp_plugin.launch.autoload import activate
activate()
print(time.process_time() - started)
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "accelerate")]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "idle")
    args = parser.parse_args()

    pipes = {name: _start(name) for name in WAYS}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for turn in range(args.warmup + args.rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            pipes[name].send("step")
            seconds = pipes[name].recv()
            if turn >= args.warmup:
                times[name].append(seconds)
    traces = {}
    for name, pipe in pipes.items():
        pipe.send("traces")
        traces[name] = pipe.recv()
        pipe.send("end")
    report = {
        "rounds": args.rounds,
        "median": {name: statistics.median(each) for name, each in times.items()},
        "fastest": {name: min(each) for name, each in times.items()},
        "to plain, turn by turn": {name: _paired(each, times["plain"]) for name, each in times.items()},
        "traces": traces,
        "import": [_import_cost() for _ in range(10)],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    args.out.with_suffix(".md").write_text(text)
    print(text)


def _paired(times: list[float], plain: list[float]) -> float:
    """The median of the ratios of neighbours: what was slow for one was slow for the other."""
    return statistics.median(a / b for a, b in zip(times, plain, strict=True))


def _start(name: str) -> Any:
    context = mp.get_context("spawn")
    mine, theirs = context.Pipe()
    before = dict(os.environ)
    for key in [key for key in os.environ if key.startswith(("TP_PLUGIN", "ACCELERATE"))]:
        del os.environ[key]
    os.environ.update({"OMP_NUM_THREADS": "1", **WAYS[name]})  # must be there when torch is imported
    context.Process(target=_work, args=(theirs,), daemon=True).start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    return mine


def _work(pipe: Any) -> None:
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8
    )
    bare = LlamaForCausalLM(config)
    before = _state_of(bare)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), lr=1e-4))
    ids = torch.randint(0, 2048, (2, 64))
    while (what := pipe.recv()) != "end":
        if what == "traces":
            pipe.send({"hooks": _state_of(accelerator.unwrap_model(model)) - before, **_traces()})
            continue
        started = time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send(time.process_time() - started)


def _state_of(model: Any) -> int:
    """Hooks on modules and parameters, and classes that are not the library's."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    hooks += sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())
    return hooks + sum("tp_plugin" in type(module).__module__ for module in model.modules())


def _traces() -> dict[str, Any]:
    """What in this process is the plugin's: its modules, and functions of other packages that it has wrapped."""
    import gc

    modules = sorted(name for name in sys.modules if name.split(".")[0] in ("tp_plugin", "model_policies"))
    patched = [
        f"{each.__module__}.{each.__qualname__}"
        for each in gc.get_objects()
        if type(each) is type(main) and "tp_patched" in vars(each)
    ]
    return {"modules": modules, "patched": patched}


def _import_cost() -> float:
    found = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={key: value for key, value in os.environ.items() if not key.startswith("TP_PLUGIN")},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(found.stdout)


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# What the plugin costs who does not use it",
        "",
        f"CPU time of a training step (Llama, 4 layers of 256, batch 2 x 64), {report['rounds']} rounds in turns; and "
        "what the process then holds of the plugin.",
        "",
        "| | median | fastest | to plain, turn by turn | modules of ours | patched functions | hooks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, trace in report["traces"].items():
        median, fastest = (f"{1000 * report[key][name]:.1f} ms" for key in ("median", "fastest"))
        ratio = f"{report['to plain, turn by turn'][name]:.4f}"
        modules = ", ".join(trace["modules"]) or "none"
        lines.append(
            f"| {name} | {median} | {fastest} | {ratio} | {modules} | {len(trace['patched'])} | {trace['hooks']} |"
        )
    costs = report["import"]
    lines += [
        "",
        f"Import and look for the key, CPU time: {1000 * statistics.median(costs):.1f} ms (median of {len(costs)} "
        f"processes, fastest {1000 * min(costs):.1f} ms).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
