"""The shared measurements (8×H100 nodes, see ../shared/planner/README.md) as arrays, and which rows are set aside."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE = 4096
SHAPES = {
    "1B": (16, 2048, 32, 8192, 1),
    "3B": (28, 3072, 32, 8192, 1),
    "8B": (32, 4096, 32, 14336, 0),
    "80B": (80, 8192, 64, 28672, 0),
}
"""Layers, width, heads, inner width, tied."""
VOCABULARY = 131072
NEARLY_FULL = 72.0
"""GB reported on rank 0 from which a run was seen to thrash."""


class Rows:
    """Columns by name; ``seconds`` of a step is nan for a run that did not run."""

    def __init__(self, **columns: Any):
        self.__dict__.update(columns)
        self.columns = columns

    def take(self, mask: Any) -> Rows:
        """Those of the rows."""
        return Rows(**{name: column[mask] for name, column in self.columns.items()})

    def __len__(self) -> int:
        return len(self.columns["tp"])


def read(path: Path) -> Rows:
    """All rows whose batch is what the chart says it is."""
    written = csv.DictReader(path.open())
    lines = [row for row in written if int(row["dp"]) * int(row["mbs"]) * int(row["grad_acc"]) == int(row["gbs"])]
    number = {name: np.array([float(line[name] or "nan") for line in lines]) for name in lines[0] if name != "model"}
    shapes = np.array([SHAPES[line["model"]] for line in lines], float).T
    gpus = number["nodes"] * 8
    seconds = 256 * SEQUENCE / (number["tok_s_gpu"] * gpus)
    layout = [f"{line['model']}/{line['tp']}/{line['pp']}/{line['dp']}" for line in lines]
    half = np.array([int(hashlib.sha1(name.encode()).hexdigest(), 16) % 2 for name in layout])
    rows = Rows(
        model=np.array([line["model"] for line in lines]), layers=shapes[0], hidden=shapes[1], heads=shapes[2],
        inner=shapes[3], tied=shapes[4], tp=number["tp"], pp=number["pp"], dp=number["dp"], mbs=number["mbs"],
        m=number["grad_acc"], zero=number["zero"], nodes=number["nodes"], seconds=seconds, gb=number["mem_gb"],
        half=half,
    )  # fmt: skip
    rows.columns["wrong"] = rows.wrong = proven_wrong(rows)  # type: ignore[attr-defined]
    rows.columns["crashed"] = rows.crashed = crashed(rows)  # type: ignore[attr-defined]
    return rows


def proven_wrong(rows: Rows, slack: float = 0.10, seconds: float = 0.06) -> Any:
    """Rows that another row proves wrong, without a model of either.

    What a stage does for a micro-batch does not depend on how many replicas and machines there are; a larger model,
    more sequences, fewer stages or, inside of a machine, fewer ranks that share it are no less of it. So a row is wrong
    whose time for each slot of the pipeline (micro-batches + pp - 1) is more than ``slack`` and ``seconds`` above that
    of a row with no less work. So is one that was nearly out of memory, where allocators thrash. (The exchange of
    gradients comes once a step: half a second of it is granted.)
    """
    slot = rows.seconds / (rows.m + rows.pp - 1)
    size = np.array([int(model.removesuffix("B")) for model in rows.model])
    found = np.zeros(len(rows), bool)
    slot = np.where(np.isnan(slot), np.inf, slot)
    for i in range(len(rows)):
        ranks = (rows.tp == rows.tp[i]) | ((rows.tp < rows.tp[i]) & (rows.tp[i] <= 8))
        more = ranks & (rows.mbs >= rows.mbs[i]) & (size >= size[i]) & (rows.pp <= rows.pp[i])
        best = np.min(np.where(more, slot, np.inf))
        found[i] = np.isfinite(slot[i]) and slot[i] > best * (1 + slack) + seconds + 0.5 / (rows.m[i] + rows.pp[i] - 1)
    return found | (rows.gb > NEARLY_FULL)


def crashed(rows: Rows) -> Any:
    """Rows that did not run, but not for want of memory: one that needs no less of it ran.

    That is one of the same model, tp and pp, no smaller micro-batch and no fewer of them in flight, and optimizer
    states split over no more replicas.
    """
    ran = ~np.isnan(rows.seconds)
    found = np.zeros(len(rows), bool)
    for i in np.flatnonzero(~ran):
        alike = ran & (rows.model == rows.model[i]) & (rows.tp == rows.tp[i]) & (rows.pp == rows.pp[i])
        alike &= (rows.mbs >= rows.mbs[i]) & (rows.m >= np.minimum(rows.m[i], rows.pp[i])) & (rows.zero <= rows.zero[i])
        found[i] = (alike & ((rows.zero == 0) | (rows.dp <= rows.dp[i])) & ((rows.dp > 1) | (rows.dp[i] == 1))).any()
    return found
