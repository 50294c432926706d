"""Which stage computes which micro-batch when: recorded from one training step, and drawn.

    python ci/bench/pipeline.py [--stages 2] [--micro-batches 8] [--schedule 1f1b]

Writes ``results/pipeline.json`` and, with matplotlib (pip install -e '.[bench]'), ``results/pipeline.png``. Stages are
processes of one thread each; their clock is the machine's. What a stage waits for a message is left white.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Event = tuple[str, int, float, float]
"""``forward``, ``backward`` or ``wait``; the micro-batch; begin and end, in seconds."""


def record(folder: Path, rows: int) -> None:
    """One launch: two steps to warm up, then one of which every stage writes its events."""
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from tp_plugin.tensor.pipeline.executor import Executor
    from tp_plugin.tensor.pipeline.messages import Messages

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=2048, max_position_embeddings=512))
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    ids = torch.randint(0, 2048, (rows, 256), generator=torch.Generator().manual_seed(1))
    events: list[Event] = []

    def timed(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                events.append((kind, args[0] if kind != "wait" else -1, begin, time.perf_counter()))

        return call

    for name in ("forward", "backward"):
        setattr(Executor, name, timed(name, getattr(Executor, name)))
    for name in ("receive_hidden", "receive_gradient"):
        setattr(Messages, name, timed("wait", getattr(Messages, name)))
    for _ in range(3):
        accelerator.wait_for_everyone()
        events.clear()
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(events), encoding="utf-8")


def launch(folder: Path, given: argparse.Namespace) -> list[list[Event]]:
    """The events of each stage."""
    options = {"pipeline_microbatches": given.micro_batches, "pipeline_schedule": given.schedule, "report": "off"}
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 1,
        "num_processes": given.stages, "machine_rank": 0, "mixed_precision": "no", "main_process_port": 0,
        "tp_size": 1, "pp_size": given.stages, "tp_plugin": options,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(folder / "config.yaml")]
    own = [str(Path(__file__).resolve()), "--into", str(folder), "--micro-batches", str(given.micro_batches)]
    subprocess.run([*command, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(given.stages)]


def busy(events: list[Event]) -> float:
    """Seconds that a stage computes."""
    return sum((end - begin) * (-1 if kind == "wait" else 1) for kind, _, begin, end in events)


def summary(stages: list[list[Event]], given: argparse.Namespace) -> dict[str, Any]:
    """How much of the step stages are idle, and how much they would be if all parts took the same time."""
    begin = min(event[2] for events in stages for event in events)
    end = max(event[3] for events in stages for event in events)
    p, m = given.stages, given.micro_batches
    return {
        "stages": p, "micro-batches": m, "schedule": given.schedule, "seconds": end - begin,
        "idle": 1 - sum(map(busy, stages)) / (p * (end - begin)), "idle of equal parts": (p - 1) / (m + p - 1),
        "events": [[(kind, at, a - begin, b - begin) for kind, at, a, b in events] for events in stages],
    }  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """A row for each stage, a bar for each forward and backward."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install -e '.[bench]'")
        return
    figure = Figure(figsize=(11, 0.9 + 0.7 * found["stages"]), layout="constrained")
    axes = figure.add_subplot()
    colours = {"forward": "#7aa6d8", "backward": "#8fbf8f", "wait": "white"}
    for stage, events in enumerate(found["events"]):
        # a wait lies inside the bar of what waits
        for kind, at, begin, end in sorted(events, key=lambda event: event[0] == "wait"):
            axes.barh(stage, end - begin, 0.8, begin, color=colours[kind], edgecolor="white", linewidth=0.5)
            if kind != "wait":
                inside = sum(b - a for what, _, a, b in events if what == "wait" and begin <= a and b <= end)
                axes.text((begin + inside + end) / 2, stage, str(at + 1), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(found["stages"]), [f"stage {stage}" for stage in range(found["stages"])])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"seconds; {found['schedule']}, {found['micro-batches']} micro-batches, forward blue, backward green; "
        f"idle {found['idle']:.0%}, of equal parts {found['idle of equal parts']:.0%}"
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    """Launch the stages, write what they did, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--schedule", choices=["1f1b", "gpipe"], default="1f1b")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.into is not None:
        record(given.into, given.micro_batches)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = summary(launch(Path(folder), given), given)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pipeline.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, RESULTS / "pipeline.png")
    print({name: value for name, value in found.items() if name != "events"})


if __name__ == "__main__":
    main()
