#!/usr/bin/env python
"""How well the formulas of ``tp-plugin plan`` predict 1,628 measured runs: time, memory, and the pick.

The runs are nanotron's (fused norms, flash attention), so a layer's work is by formula here, where a plan traces it;
all the rest is the plan's own code. Constants are fitted on one half of the layouts and judged on the other; rows that
other rows prove wrong are set aside by plan_rows.py's rule.

    python ci/bench/plan.py                 # writes ci/bench/results/plan.md and plan.json; fails outside of GOALS
    python ci/bench/plan.py --rows FILE --judge    # the constants in plan.json, judged on all rows of another file
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from plan_rows import SEQUENCE, VOCABULARY, Rows, read  # noqa: E402

from tp_plugin.estimate.hardware import GIB, gpu  # noqa: E402
from tp_plugin.estimate.memory import CONTEXT, FRAGMENTS, USABLE  # noqa: E402
from tp_plugin.estimate.timing import Rates, data_seconds, exposed, product, ring, soft_maximum, step  # noqa: E402

ROWS = HERE.parents[2] / "shared" / "planner" / "h100_measurements.csv"
H100 = gpu("h100")
PER_NODE = 8
KERNELS, COLLECTIVES = 100, 10
"""Of a layer's forward and backward."""

GOALS = {
    "pp = 1, median": 0.05, "pp = 1, p90": 0.15, "pp > 1, median": 0.08, "pp > 1, p90": 0.20,
    "pick within 10%": 0.85, "top three within 5%": 0.95,
    '"out of memory" wrong': 0.005, '"fits" wrong': 0.02, '"tight"': 0.10,
}  # fmt: skip
AT_LEAST = ("pick within 10%", "top three within 5%")


@dataclasses.dataclass(frozen=True)
class Nanotron(Rates):
    """With what is this trainer's own.

    Attributes:
        across, beside: seconds of the host for each layer where a pipeline with tp > 1 goes over machines: for each TP
            rank, and besides.
        staged: how much longer the exchange over the data group takes in a pipeline.
    """

    across: float = 2e-3
    beside: float = 8e-3
    staged: float = 1.5


FITTED = (
    "across", "beside", "staged",
    "product", "half", "attention", "memory", "kernel", "collective", "link", "latency", "hop", "network", "hidden",
    "data_link", "data_hidden", "data_latency", "partitioned", "stage", "step",
)  # fmt: skip
RESTARTS = 12
SHARES = ("product", "attention", "memory", "link", "network", "hidden", "data_link", "data_hidden")


def stages(rows: Rows) -> tuple[Any, Any, Any]:
    """Layers of the first, of the fullest middle and of the last stage, by nanotron's rule: by cost, head included."""
    found = []
    for layers, hidden, inner, pp in zip(rows.layers, rows.hidden, rows.inner, rows.pp, strict=True):
        each, head = 4 * hidden**2 + 3 * hidden * inner, VOCABULARY * hidden
        counts, at, seen = [0] * int(pp), 0, 0.0
        for _ in range(int(layers)):
            seen += each
            counts[at] += 1
            if seen > (layers * each + head) * (at + 1) / pp and at < pp - 1:
                at += 1
        found.append((counts[0], max(counts[1:-1], default=0), counts[-1] if pp > 1 else counts[0]))
    return tuple(np.array(column, float) for column in zip(*found, strict=True))  # type: ignore[return-value]


def layer(rows: Rows, r: Nanotron) -> tuple[Any, Any, Any]:
    """Seconds of a layer's forward and backward: compute, exposed collectives, host."""
    t, h, f, tok = rows.tp, rows.hidden, rows.inner, rows.mbs * SEQUENCE
    forward = backward = 0.0
    for k, n in ((h, 3 * h / t), (h / t, h), (h, 2 * f / t), (f / t, h)):
        forward = forward + product(1, tok, k, n, r, H100)
        backward = backward + product(1, tok, n, k, r, H100) + product(1, k, tok, n, r, H100)
    attention = 2 * SEQUENCE * tok * h / t / (H100.peak * r.attention)
    rate = H100.bandwidth * r.memory
    forward = forward + attention + tok * (36 * h / t + 10 * f / t) / rate
    backward = backward + 2.5 * attention + tok * (60 * h / t + 26 * f / t) / rate
    one = ring("reduce_scatter", 2 * h * tok, t, r, H100, PER_NODE)
    # two gathers and two scatters forward; as many backward, and two gathers again for the weights' gradients
    comm = 4 * one + 2 * one + exposed(4 * one, r.hidden * backward)
    host = KERNELS * r.kernel + np.where(t > 1, COLLECTIVES * r.collective, 0.0)
    crossing = (rows.pp > 1) & (rows.nodes > 1) & (t > 1)
    return forward + backward, comm, np.where(crossing, np.maximum(host, r.across * t + r.beside), host)


def parameters(rows: Rows, layers: Any, embeddings: Any) -> Any:
    """On a rank of the TP group."""
    each = 4 * rows.hidden**2 + 3 * rows.hidden * rows.inner
    return (layers * each + embeddings * VOCABULARY * rows.hidden) / rows.tp


def seconds(rows: Rows, r: Nanotron) -> Any:
    """Of a step."""
    first, middle, last = stages_of(rows)
    alone, tok = rows.pp == 1, rows.mbs * SEQUENCE
    compute, comm, host = layer(rows, r)
    width = VOCABULARY / rows.tp
    head = product(1, tok, rows.hidden, width, r, H100) + product(1, tok, width, rows.hidden, r, H100)
    head = head + product(1, rows.hidden, tok, width, r, H100) + 52 * tok * width / (H100.bandwidth * r.memory)
    head = head + 4 * ring("reduce_scatter", 2 * rows.hidden * tok, rows.tp, r, H100, PER_NODE)

    def accumulate(layers: Any, embeddings: Any) -> Any:
        return 14 * parameters(rows, layers, embeddings) / (H100.bandwidth * r.memory)

    one = compute + comm
    t0 = soft_maximum(
        first * one + np.where(alone, head, 0) + accumulate(first, 1.0), (first + np.where(alone, 2, 0.5)) * host
    )
    t1 = np.where(rows.pp > 2, soft_maximum(middle * one + accumulate(middle, 0.0), middle * host), 0.0)
    t2 = np.where(alone, 0.0, soft_maximum(last * one + head + accumulate(last, 1.0), (last + 1.5) * host))
    slowest = np.maximum(np.maximum(t0, t1), t2)
    rest = rows.layers - first - np.where(alone, 0, last)
    through = t0 + t2 + np.where(rows.pp > 2, t1 * rest / np.maximum(middle, 1), 0.0)
    far = rows.tp * rows.dp >= PER_NODE
    rate = np.where(far, H100.network * r.network, H100.link * r.link)
    hop = np.where(alone, 0.0, r.stage + 4 * rows.hidden * tok / rows.tp / rate)
    count = np.where(
        alone,
        parameters(rows, rows.layers, 2 - rows.tied),
        np.maximum(parameters(rows, first, 1), parameters(rows, last, 1)),
    )
    factor = np.where(rows.zero >= 1, r.partitioned * 1.5, 2.0)
    exchange = data_seconds(4 * count, rows.dp, rows.tp, factor, r, H100, PER_NODE)
    exchange = exchange * np.where(alone, 1.0, r.staged)
    split = np.where(rows.zero >= 1, rows.dp, 1)
    update = count * (16 + 34 / split) / (H100.bandwidth * r.memory)
    others = exposed(exchange, r.data_hidden * slowest * 2 / 3) + update
    return step(slowest, through, rows.m, rows.pp, hop, others, r)


_stages: dict[int, Any] = {}


def stages_of(rows: Rows) -> Any:
    """Computed once for each set of rows."""
    if id(rows) not in _stages:
        _stages[id(rows)] = (rows, stages(rows))
    return _stages[id(rows)][1]


def fit(rows: Rows) -> Nanotron:
    """Constants with the least mean deviation: without stages first, then all."""
    start = Nanotron(product=0.58, half=64, attention=0.4, kernel=2e-5, collective=2e-4, step=0.06, source="fitted")
    start = _descend(rows.take(rows.pp == 1), start, 1.4)[0]
    random = np.random.default_rng(0)
    best, least = _descend(rows, start, 1.3)
    for _ in range(RESTARTS):  # from beside the best
        moved = {name: getattr(best, name) * 2 ** random.normal(0, 0.6) for name in FITTED}
        moved = {name: min(value, 0.95) if name in SHARES else value for name, value in moved.items()}
        found, value = _descend(rows, dataclasses.replace(best, **moved), 1.3)
        if value < least:
            best, least = found, value
    return best


def _descend(rows: Rows, r: Nanotron, width: float) -> tuple[Nanotron, float]:
    """Along one constant after the other, in smaller and smaller steps."""

    def loss(values: Nanotron) -> float:
        off = np.abs(np.log(seconds(rows, values) / rows.seconds))
        return float(np.mean(np.minimum(off, 0.3)))  # what is far off is another build's

    best = loss(r)
    for _ in range(12):
        for name in FITTED:
            for factor in (width, 1 / width):
                while True:
                    value = getattr(r, name) * factor
                    if name in SHARES and value > 1:
                        break
                    other = dataclasses.replace(r, **{name: value})
                    found = loss(other)
                    if found >= best - 1e-6:
                        break
                    r, best = other, found
        width = 1 + (width - 1) * 0.8
    return r, best


def memory(rows: Rows) -> tuple[Any, Any, Any]:
    """GB on the fullest stage, between which and which, and on the first."""
    first, middle, last = stages_of(rows)
    alone, tok, t = rows.pp == 1, rows.mbs * SEQUENCE, rows.tp
    h, f = rows.hidden, rows.inner
    kept = tok * (8 * h / t + 6 * h / t + 2 * h / t + 4 * rows.heads / t + 8 * f / t)
    found = []
    for layers, front, back, stage, there in (
        (first, 1, alone, 0, np.ones(len(rows), bool)), (middle, 0, 0, 1, rows.pp > 2),
        (last, alone, 1, rows.pp - 1, ~alone),
    ):  # fmt: skip
        n = parameters(rows, layers, front + back * np.where(alone, 1 - rows.tied, 1))
        split = np.where(rows.zero >= 1, rows.dp, 1)
        states = n * (2 + 4 + 12 / split + 2 * (rows.dp > 1))
        flight = np.minimum(rows.pp - stage, rows.m)
        acts, loss = kept * layers * flight, back * 11 * tok * VOCABULARY / t
        base = states + np.maximum(acts + loss, acts - kept * layers + 2 * n)
        ahead = np.where(t > 1, 4 * layers * h * tok, 0) * np.where(alone, 1.0, flight)
        low = base + CONTEXT
        high = (base + ahead + 2 * back * tok * VOCABULARY / t) * (1 + FRAGMENTS) + CONTEXT + 0.7 * GIB
        found.append((np.where(there, low, 0), np.where(there, high, 0)))
    lows, highs = (np.max([each[i] for each in found], axis=0) for i in (0, 1))
    return lows / GIB, highs / GIB, found[0][0] / GIB


def judge(rows: Rows, r: Nanotron) -> dict[str, Any]:
    """All figures of some rows."""
    ran = rows.take(~np.isnan(rows.seconds))
    wrong = ran.wrong
    off = np.abs(seconds(ran, r) / ran.seconds - 1)
    found: dict[str, Any] = {}
    for name, mask in (("pp = 1", ran.pp == 1), ("pp > 1", ran.pp > 1)):
        for label, some in (("", ~wrong), (" (all rows)", np.ones(len(ran), bool))):
            found[f"{name}{label}, median"] = float(np.median(off[mask & some]))
            found[f"{name}{label}, p90"] = float(np.quantile(off[mask & some], 0.9))
    found["rows"], found["ran"], found["set aside"] = len(rows), len(ran), int(wrong.sum())
    low, high, _ = memory(rows)
    room, runs = USABLE * H100.memory / GIB, ~np.isnan(rows.seconds)
    full, fits = low > room, high <= room
    found['"out of memory" wrong'] = float((full & runs).sum() / max(runs.sum(), 1))
    found['"fits" wrong'] = float((fits & ~runs & ~rows.crashed & possible(rows)).sum() / max(fits.sum(), 1))
    found['"tight"'] = float((~full & ~fits).sum() / len(rows))
    found |= picks(ran.take(~wrong), r)
    return found


def possible(rows: Rows) -> Any:
    """Layouts that can run at all: no empty last stage, and no fewer layers than stages."""
    return (stages_of(rows)[2] > 0) & (rows.pp <= rows.layers)


def picks(rows: Rows, r: Nanotron) -> dict[str, float]:
    """For each model and number of machines: is the layout that the formulas choose among the measured ones good?"""
    said, first, three = seconds(rows, r), [], []
    for model in np.unique(rows.model):
        for nodes in np.unique(rows.nodes):
            mine = np.flatnonzero((rows.model == model) & (rows.nodes == nodes))
            if len(mine) < 4:
                continue
            order = mine[np.argsort(said[mine])]
            best = rows.seconds[mine].min()
            first.append(rows.seconds[order[0]] / best <= 1.10)
            three.append(rows.seconds[order[:3]].min() / best <= 1.05)
    return {
        "pick within 10%": float(np.mean(first)),
        "top three within 5%": float(np.mean(three)),
        "choices": len(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan")
    args = parser.parse_args()
    rows = read(args.rows)
    if args.judge:
        rates = Nanotron(**json.loads(args.out.with_suffix(".json").read_text())["rates"])
        found = judge(rows, rates)
        print(json.dumps(found, indent=1))
    else:
        learn = rows.take((rows.half == 0) & ~np.isnan(rows.seconds))
        rates = fit(learn.take(~learn.wrong))
        found = judge(rows.take(rows.half == 1), rates)
        report = {
            "rates": dataclasses.asdict(rates),
            "held back": found,
            "fitted on": judge(rows.take(rows.half == 0), rates),
        }
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
        print(markdown(report))
    missed = [n for n, goal in GOALS.items() if (found[n] < goal if n in AT_LEAST else found[n] > goal)]
    sys.exit(f"outside of the goals: {missed}" if missed else 0)


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    held, learnt, rates = report["held back"], report["fitted on"], report["rates"]
    lines = [
        "# The plan's formulas against measured runs",
        "",
        f"8×H100 nodes, models of 1 to 80 B parameters, sequence {SEQUENCE}, 256 sequences a step. Constants "
        f"fitted on {learnt['ran']} runs, judged on {held['ran']} runs of other layouts (model, tp, pp, dp); of these "
        f"{held['set aside']} that another run proves wrong are set aside (plan_rows.py has the rule). Memory: all "
        "rows, also those that did not run.",
        "",
        "| | held back | fitted on | goal |",
        "|---|---|---|---|",
    ]
    for name in held:
        if isinstance(held[name], float):
            goal = GOALS.get(name)
            shown = "" if goal is None else f"{'≥' if name in AT_LEAST else '≤'} {goal:.1%}"
            lines.append(f"| {name} | {held[name]:.1%} | {learnt[name]:.1%} | {shown} |")
    lines += ["", f"{held['choices']} choices (model × machines). Constants:", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in rates.items() if isinstance(value, float)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
