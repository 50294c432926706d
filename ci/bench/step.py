#!/usr/bin/env python
r"""A training step of a small Llama, contender against contender, in one run.

Every contender lives in processes of its own, one thread each, and all take turns (A B C A B C …), so that what else
the machine does hits all alike. Reported are medians, and their ratios to one process of one thread: of the time on the
clock, and of the processor time of the busier rank, which other programs hardly change but which knows no waiting.

    pip install -e '.[bench]'                    # for the plot
    python ci/bench/step.py                      # all; writes ci/bench/results/step.json, step.md and step.png
    python ci/bench/step.py --only "tp_plugin" --rounds 20 --profile
    python ci/bench/step.py --batch 8 --length 512 --only "one process" --only "tp_plugin" \
        --only "tp_plugin, two stages" --out ci/bench/results/stages     # rows as long as a pipeline wants them
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

SHAPE = {
    "vocab_size": 16384, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10,
    "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
"""70.6 million parameters."""


def main() -> None:
    from contenders import CONTENDERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="may be repeated")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step")
    parser.add_argument("--profile", action="store_true", help="also print where rank 0 of each spends its time")
    args = parser.parse_args()

    names = args.only or list(CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args.layers)
        teams = {}
        try:
            for name in names:  # one after the other: loading is not measured
                teams[name] = Team(name, folder, args)
                print(f"{name}: {teams[name].failure or 'ready'}", flush=True)
            running = {name: team for name, team in teams.items() if not team.failure}
            noise = Noise()
            for turn in range(args.warmup + args.rounds):
                for team in running.values():
                    team.step(turn, timed=turn >= args.warmup)
            measured = noise.measured()
            results = {name: team.result() for name, team in teams.items()}
        finally:
            for team in teams.values():
                team.stop()
    report = summary(results, args, measured)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    show(report)
    plot(report, args.out.with_suffix(".png"))


def make_model(folder: str, layers: int) -> None:
    """A checkpoint that all contenders load."""
    os.environ["TP_PLUGIN_DISABLE"] = "1"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).save_pretrained(folder)


class Team:
    """The processes of one contender."""

    def __init__(self, name: str, folder: str, args: argparse.Namespace):
        from contenders import CONTENDERS

        kind = CONTENDERS[name]
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes, self.failure = [], [], ""
        self.times, self.cpu_times, self.losses = [], [], []
        before = dict(os.environ)
        for rank in range(kind.world):
            # the environment must be there when torch is imported, so before the process begins
            os.environ.clear()
            os.environ.update({k: v for k, v in before.items() if not k.startswith(("TP_PLUGIN", "ACCELERATE_"))})
            os.environ.update({"OMP_NUM_THREADS": "1", **kind.environment})
            if kind.world > 1:
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(kind.world)})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"})
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(name, folder, vars(args), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        os.environ.clear()
        os.environ.update(before)
        self._answers()

    def _answers(self) -> list[Any]:
        found = []
        for pipe in self.pipes:
            try:
                ok, value = pipe.recv() if pipe.poll(300) else (False, "no answer in 300 s")
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                self.failure = str(value).strip().splitlines()[-1]
                print(value, file=sys.stderr)
            found.append(value)
        return found

    def step(self, turn: int, timed: bool) -> None:
        """One step of all ranks; the slowest counts."""
        if self.failure:
            return
        for pipe in self.pipes:
            pipe.send(("step", turn))
        found = self._answers()
        if timed and not self.failure:
            self.times.append(max(wall for wall, _, _ in found))
            self.cpu_times.append(max(cpu for _, cpu, _ in found))
        if not self.failure:
            self.losses.append(found[0][2])

    def result(self) -> dict[str, Any]:
        if self.failure:
            return {"failed": self.failure}
        for pipe in self.pipes:
            pipe.send(("result", 0))
        found = self._answers()
        return {
            "median": statistics.median(self.times),
            "fastest": min(self.times),
            "cpu": statistics.median(self.cpu_times),
            "cpu least": min(self.cpu_times),
            "times": self.times,
            "cpu times": self.cpu_times,
            "losses": self.losses,
            "bytes": max(each["bytes"] for each in found),
            "collectives": found[0]["collectives"],
            "profile": found[0]["profile"],
        }

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def work(name: str, folder: str, args: dict[str, Any], pipe: Any) -> None:
    """One process of a contender: builds, then steps when it is told."""
    try:
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        from contenders import CONTENDERS, counted

        contender = CONTENDERS[name](folder)

        def batch(turn: int) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(turn)
            ids = torch.randint(3, SHAPE["vocab_size"], (args["batch"], args["length"]), generator=generator)
            return {"input_ids": ids, "labels": ids.clone()}

        pipe.send((True, None))
        while True:
            what, turn = pipe.recv()
            if what == "step":
                data = batch(turn)
                if contender.world > 1:
                    torch.distributed.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                loss = contender.step(data)
                contender.clear()
                pipe.send((True, (time.perf_counter() - wall, time.process_time() - cpu, loss)))
                continue
            collectives: dict[str, int] = {}
            with counted(collectives):
                contender.step(batch(1000))
            held = contender.bytes_held()  # before the gradients go
            contender.clear()
            profile = _profile(contender, batch(1001)) if args["profile"] else ""
            pipe.send((True, {"bytes": held, "collectives": collectives, "profile": profile}))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _profile(contender: Any, data: Any) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        contender.step(data)
        contender.clear()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)


class Noise:
    """How much of the machine others took: busy time of all cores beside that of this program's processes."""

    def __init__(self) -> None:
        self.start = self._now()
        self.load = os.getloadavg()[0]

    def _now(self) -> tuple[float, float]:
        fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        ours = 0.0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parts = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(parts[1]) == os.getpid() or path.parent.name == str(os.getpid()):
                ours += int(parts[11]) + int(parts[12])
        return (sum(fields) - idle), ours

    def measured(self) -> dict[str, float]:
        busy, ours = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return {"load before": self.load, "share of busy time that was others'": max(0.0, 1 - ours / max(busy, 1))}


def summary(results: dict[str, Any], args: argparse.Namespace, noise: dict[str, float]) -> dict[str, Any]:
    import accelerate
    import torch
    import transformers

    one = results.get("one process", {})
    for result in results.values():
        if "median" in result and "median" in one:
            result["ratio"] = result["median"] / one["median"]
            result["cpu ratio"] = result["cpu"] / one["cpu"]
            result["loss apart"] = max(abs(a / b - 1) for a, b in zip(result["losses"], one["losses"], strict=True))
            result["bytes to share"] = result["bytes"] / one["bytes"] * (2 if result is not one else 1)
    shape = {**SHAPE, "num_hidden_layers": args.layers}
    return {
        "shape": shape,
        "tokens": args.batch * args.length,
        "rounds": args.rounds,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), **noise},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        "results": results,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


COLUMNS = (
    "contender",
    "median",
    "fastest",
    "CPU",
    "to one process",
    "CPU to one process",
    "bytes to share",
    "loss apart",
    "all-reduces",
    "others",
)


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table."""
    found = []
    for name, result in report["results"].items():
        if "failed" in result:
            found.append((name, f"failed: {result['failed'][:60]}", *[""] * 8))
            continue
        counts = dict(result["collectives"])
        reduces = sum(counts.pop(key) for key in [k for k in counts if "all_reduce" in k or "allreduce" in k])
        others = ", ".join(f"{count} {key}" for key, count in counts.items())
        keys = "ratio", "cpu ratio", "bytes to share"
        ratio, cpu, share = (f"{result[key]:.2f}" if key in result else "" for key in keys)
        apart = f"{result['loss apart']:.0e}" if "loss apart" in result else ""
        times = (f"{result[key]:.2f} s" for key in ("median", "fastest", "cpu"))
        found.append((name, *times, ratio, cpu, share, apart, str(reduces), others))
    return found


def markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    others = machine["share of busy time that was others'"]
    lines = [
        "# A training step on two gloo ranks of one thread",
        "",
        f"Llama, {report['shape']['num_hidden_layers']} layers, width {report['shape']['hidden_size']}, vocabulary "
        f"{report['shape']['vocab_size']:,}, {report['tokens']} tokens a step, fp32; median of {report['rounds']} "
        f"steps, contenders in turns. {machine['cpu']}, {machine['cores']} cores; {others:.0%} of the busy time was "
        f"other programs'. torch {report['versions']['torch']}, transformers {report['versions']['transformers']}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(report)),
        "",
        "Bytes: parameters, gradients and optimizer states of the fullest rank, relative to half of one process's. "
        "Loss: the largest relative deviation from one process's at any step. CPU: processor time of the busier rank, "
        "all its threads; unlike the time on the clock it hardly depends on what else runs.",
        "",
    ]
    return "\n".join(lines)


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows(report):
        table.add_row(*row)
    Console(width=150).print(table)
    for name, result in report["results"].items():
        if result.get("profile"):
            print(f"--- {name}\n{result['profile']}")
    print({key: round(value, 2) if isinstance(value, float) else value for key, value in report["machine"].items()})


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: each contender's time and processor time relative to one process."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install -e '.[bench]'")
        return
    found = {name: result for name, result in report["results"].items() if "ratio" in result}
    if not found:
        return  # nothing to compare with
    figure = Figure(figsize=(8, 0.7 + 0.5 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    at = range(len(found))
    axes.barh([y - 0.2 for y in at], [r["ratio"] for r in found.values()], 0.4, label="time (median)")
    axes.barh([y + 0.2 for y in at], [r["cpu ratio"] for r in found.values()], 0.4, label="processor time of a rank")
    axes.set_yticks(list(at), list(found))
    axes.invert_yaxis()
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("one step, relative to one process of one thread (dotted: half of it)")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
