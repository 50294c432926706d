"""Stacked bars of memory per rank and of a step's time, for the layouts that a plan shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tp_plugin.errors import TPError
from tp_plugin.estimate.hardware import GIB, Gpu
from tp_plugin.estimate.job import Candidate


def check(path: Path) -> None:
    """Whether :func:`draw` can write there.

    Raises:
        TPError: matplotlib is not installed, or it cannot.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TPError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or not path.absolute().parent.is_dir():
        raise TPError(f"--plot {path}: expected a .png, .pdf or .svg file in a folder that exists")


def draw(path: Path, shown: list[Candidate], gpu: Gpu, *, timed: bool) -> None:
    """Write the picture; :func:`check` was called."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    layouts = [c.layout for c in shown]
    names = [f"tp {x.tp} pp {x.pp} dp {x.dp}\n{x.engine} {x.micro_batch}×{x.accumulation}" for x in layouts]
    _bars(left, names, [{name: value / GIB for name, value in c.memory.parts.items()} for c in shown])
    left.axhline(gpu.memory / GIB, color="black", linestyle="--", linewidth=1)
    left.set(title=f"Memory per rank ({gpu.name}: dashed)", ylabel="GiB")
    unit = 1.0 if timed else shown[0].seconds
    _bars(right, names, [{name: max(value, 0) / unit for name, value in c.time.items()} for c in shown])
    right.set(title="Time of a step", ylabel="seconds" if timed else "to the first layout")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axes: Any, names: list[str], columns: list[dict[str, float]]) -> None:
    bottom = [0.0] * len(names)
    for part in columns[0]:
        heights = [column[part] for column in columns]
        axes.bar(names, heights, 0.6, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.legend(fontsize=8)
