"""What ``tp-plugin plan`` prints, as tables or as data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tp_plugin.cli import plan_plot
from tp_plugin.cli.plan import planner
from tp_plugin.cli.plan_arguments import job_and_cluster
from tp_plugin.cli.plan_configs import config_of, write_configs
from tp_plugin.estimate.calibration import NAMES, Calibration
from tp_plugin.estimate.hardware import GIB
from tp_plugin.estimate.job import Candidate, Cluster, Job, PlanError
from tp_plugin.estimate.questions import Questions
from tp_plugin.estimate.search import Planner
from tp_plugin.estimate.timing import Rates


def run(arguments: argparse.Namespace) -> int:
    """Plan and print; returns the exit status: 0 also where nothing fits, for that is an answer.

    Raises:
        TPError: bad input; nothing was written.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    job, cluster = job_and_cluster(arguments)
    if arguments.plot:
        plan_plot.check(arguments.plot)
    rates = Rates()
    if arguments.calibration:
        rates, cluster = _calibrated(arguments, job, cluster)
    found = planner(arguments.target, cluster, job, rates=rates)
    if arguments.calibrate:
        return _calibrate(found, arguments.calibrate)
    candidates = found.candidates()
    shown = distinct(candidates, max(arguments.top, 1))
    questions = Questions(found, candidates)
    if arguments.write:
        write_configs(arguments.write, shown, job, cluster)
    if arguments.plot:
        plan_plot.draw(arguments.plot, shown, found.gpu, timed=found.rates.is_measured)
    if arguments.json:
        print(json.dumps(as_data(found, shown, questions, len(candidates)), indent=1))
        return 0
    Report(found, shown, questions, len(candidates)).print()
    if arguments.write:
        print(f"Wrote {', '.join(sorted(path.name for path in arguments.write.iterdir()))} to {arguments.write}.")
    return 0


def _calibrated(arguments: argparse.Namespace, job: Job, cluster: Cluster) -> tuple[Rates, Cluster]:
    """The constants of the file, and the cluster with the device that they were measured on."""
    path, found = arguments.calibration, Calibration.read(arguments.calibration)
    if arguments.calibrate:
        raise PlanError("--calibrate writes a file, --calibration reads one: give one of them")
    if found.dtype and found.dtype != job.dtype:
        raise PlanError(f"--calibration {path} was measured in {found.dtype}, the plan is for {job.dtype}: add --dtype")
    if found.gpu is None:
        return found.rates, cluster
    if arguments.gpu:
        raise PlanError(
            f"--gpu {arguments.gpu}: --calibration {path} has the figures of {found.gpu.name}; leave it out"
        )
    return found.rates, dataclasses.replace(cluster, gpu=found.gpu)


def _calibrate(planned: Planner, path: Path) -> int:
    """Measure, and say what was found."""
    from tp_plugin.cli.plan_calibrate import calibrate

    found = calibrate(planned, path)
    measured = ", ".join(f"{name} {getattr(found.rates, name):.3g}" for name in found.rates.measured)
    assumed = ", ".join(name for name in NAMES if name not in found.rates.measured)
    print(f"Wrote {path}. Measured: {measured}. Assumed: {assumed}.")
    return 0


def distinct(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best that are different answers: of one tp, pp and engine only the best one."""
    found: dict[Any, Candidate] = {}
    for candidate in candidates:
        layout = candidate.layout
        found.setdefault((layout.tp, layout.pp, layout.engine), candidate)
    return list(found.values())[:count]


def as_data(planned: Planner, shown: list[Candidate], questions: Questions, count: int) -> dict[str, Any]:
    """What ``--json`` prints."""
    best = shown[0]
    return {
        "model_type": planned.model.config.model_type,  # type: ignore[union-attr]
        "parameters": questions.parameters,
        "job": dataclasses.asdict(planned.job),
        "gpu": dataclasses.asdict(planned.gpu),
        "gpus": planned.cluster.gpus,
        "gpus_per_node": planned.cluster.gpus_per_node,
        "legal_tp": planned.legal,
        "layouts_considered": count,
        "rates": dataclasses.asdict(planned.rates),
        "seconds_are": "measured constants" if planned.rates.is_measured else "for ranking only",
        "candidates": [
            {**each.as_dict(), "config": config_of(each.layout, planned.job, planned.cluster)} for each in shown
        ],
        "largest_micro_batch": questions.largest_micro_batch(best),
        "largest_sequence": questions.largest_sequence(best),
        "least_gpus": questions.least_gpus(),
        "switches": [dataclasses.asdict(each) for each in questions.switches(best)],
        "inference": questions.inference(),
        "notes": questions.notes(shown),
    }


class Report:
    """The tables."""

    def __init__(self, planned: Planner, shown: list[Candidate], questions: Questions, count: int):
        self.planned, self.shown, self.questions, self.count = planned, shown, questions, count
        self.console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
        self.timed = planned.rates.is_measured

    def print(self) -> None:
        """All of it."""
        job, cluster, say = self.planned.job, self.planned.cluster, self._say
        model_type, gpu = self.planned.model.config.model_type, self.planned.gpu  # type: ignore[union-attr]
        what = f"LoRA r={job.lora_rank}" if job.lora_rank else "all weights"
        say(
            f"{model_type}, {self.questions.parameters / 1e9:,.2f} B parameters, {what} in "
            f"{job.dtype}{', ' * bool(job.quantized)}{job.quantized}, {job.optimizer}; {job.global_batch} sequences "
            f"of {job.sequence:,} tokens a step; {cluster.gpus} × {gpu.name} ({gpu.memory / GIB:.0f} "
            f"GiB), {cluster.gpus_per_node} in a machine. {self.count} layouts considered; legal tp: "
            f"{', '.join(map(str, self.planned.legal))}."
        )
        self.console.print(self._layouts())
        self.console.print(self._memory())
        self.console.print(self._time())
        best = self.shown[0]
        say(f"Config of the first:\n\n{config_of(best.layout, job, cluster)}")
        self.console.print(self._switches())
        for line in self.questions.notes(self.shown):
            say(line)
        if best.verdict == "out of memory":
            say("[bold red]Nothing fits.[/bold red] " + self.questions.least_gpus_line())
        else:
            say(
                f"The first has room for a micro-batch of {self.questions.largest_micro_batch(best)}, or a sequence of "
                f"{self.questions.largest_sequence(best):,} tokens. {self.questions.least_gpus_line()}"
            )
        say(self.questions.inference_line())
        if job.tokens:
            say(self.questions.hours_line(best))
        source, measured = self.planned.rates.source, self.planned.rates.measured
        say(
            "Memory: parameters, gradients and states from the layout record, activations by tracing a layer of each "
            "kind; "
            f"context, communicators and fragmentation are assumed. Time: {source} constants"
            + (
                f". Measured: {', '.join(measured)}. Assumed: {', '.join(n for n in NAMES if n not in measured)}."
                if self.timed
                else f" for this ranking only ({self.planned.gpu.source}); a --calibration gives seconds."
            )
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=False)

    def _layouts(self) -> Table:
        columns = ["", "layout", "verdict", "memory", "fullest stage"]
        columns += ["step", "tokens/s/GPU"] if self.timed else ["step, to the first"]
        table = Table(*columns, title="Layouts, best first")
        for number, each in enumerate(self.shown, 1):
            colour = {"fits": "green", "tight": "yellow"}.get(each.verdict, "red")
            interval = f"{each.memory.low / GIB:.1f}–{each.memory.high / GIB:.1f} GiB"
            step = [
                f"{each.seconds:.2f} s" if each.seconds > 1 else f"{1e3 * each.seconds:.1f} ms",
                f"{each.tokens_per_gpu:,.0f}",
            ]
            step = step if self.timed else [f"{each.seconds / self.shown[0].seconds:.2f} ×"]
            table.add_row(
                str(number), each.layout.short, f"[{colour}]{each.verdict}[/{colour}]", interval,
                f"{each.memory.stage + 1} of {each.layout.pp}", *step,
            )  # fmt: skip
        return table

    def _memory(self) -> Table:
        names = list(self.shown[0].memory.parts)
        table = Table("", *names, title="GiB per rank, by part")
        for number, each in enumerate(self.shown, 1):
            table.add_row(str(number), *(f"{each.memory.parts[name] / GIB:.2f}" for name in names))
        return table

    def _time(self) -> Table:
        names = list(self.shown[0].time)
        table = Table("", *names, title="Why: share of a step")
        for number, each in enumerate(self.shown, 1):
            table.add_row(str(number), *(f"{max(each.time[name], 0) / each.seconds:.1%}" for name in names))
        return table

    def _switches(self) -> Table:
        table = Table("of the first layout", "memory", "time", title="What else saves and costs")
        for each in self.questions.switches(self.shown[0]):
            table.add_row(each.name, f"{each.bytes / GIB:+.1f} GiB", f"{each.time:+.0%}")
        return table
