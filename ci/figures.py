"""The figures of the docs, drawn by matplotlib as SVG: python ci/docs.py --figures"""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
RANKS = ("#2f6fb0", "#d17b0f", "#3c8d5a", "#8a4fa3")
PAPER = "#ffffff"


def draw(folder: Path) -> None:
    """Write every figure into ``folder``."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tp_plugin", "font.family": "sans-serif"})
    folder.mkdir(parents=True, exist_ok=True)
    for figure in (f_and_g, layouts, units):
        drawn = figure()
        drawn.savefig(folder / f"{figure.__name__}.svg", facecolor=PAPER, bbox_inches="tight", metadata={"Date": None})


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width * 10)
    axes.set_ylim(0, height * 10)
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, w: float, h: float, text: str, colour: str = INK, fill: str = PAPER) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.2,rounding_size=0.8", ec=colour, fc=fill, lw=1.4))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=colour, fontsize=9)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = INK, **style: Any) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, **style})


def f_and_g() -> Any:
    """One block on two ranks: where it communicates, forward and backward."""
    figure, axes = _canvas(8.6, 3.6)
    _box(axes, 2, 14, 9, 8, "x\nwhole", SOFT)
    _box(axes, 78, 14, 7, 8, "y\nwhole", SOFT)
    for rank, y in enumerate((23, 5)):
        colour = RANKS[rank]
        _box(axes, 24, y, 15, 8, f"column-parallel\nrank {rank}: half the rows", colour)
        _box(axes, 42, y, 9, 8, "heads,\nGeLU, …", colour)
        _box(axes, 54, y, 12, 8, "row-parallel\nhalf the columns", colour)
        _arrow(axes, (19, 18), (23.6, y + 4), colour)
        _arrow(axes, (39.4, y + 4), (41.6, y + 4), colour)
        _arrow(axes, (51.4, y + 4), (53.6, y + 4), colour)
        _arrow(axes, (66.4, y + 4), (70, 18), colour)
    _box(axes, 14, 15, 4.4, 6, "f", INK, "#eef2f6")
    _box(axes, 70, 15, 4.4, 6, "g", INK, "#eef2f6")
    _arrow(axes, (11.4, 18), (13.6, 18))
    _arrow(axes, (74.8, 18), (77.6, 18))
    axes.text(16.2, 11.5, "forward: nothing\nbackward: all-reduce", ha="center", va="top", fontsize=8, color=SOFT)
    axes.text(77, 11.5, "forward: all-reduce\nbackward: nothing", ha="center", va="top", fontsize=8, color=SOFT)
    return figure


def layouts() -> Any:
    """Which part of each weight a rank holds, of three ranks."""
    figure, axes = _canvas(8.6, 3.2)
    heads = [(0, 0.5), (0.5, 0.75), (0.75, 1)]  # four heads on three ranks
    rows = [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    fused = [(block / 3 + a / 3, block / 3 + b / 3) for block in range(3) for a, b in heads]
    pictures = (
        ("q_proj\n(4 heads, by rows)", heads, range(3), False),
        ("o_proj\n(4 heads, by columns)", heads, range(3), True),
        ("fused [q|k|v]\n(each block by itself)", fused, [0, 1, 2] * 3, False),
        ("embedding, head\n(vocabulary)", rows, range(3), False),
        ("norm\n(replicated)", [(0, 1)], [3], False),
    )
    for place, (title, ranges, ranks, columns) in enumerate(pictures):
        x, size = 2 + place * 17, 14
        for (a, b), rank in zip(ranges, ranks, strict=True):
            colour = RANKS[rank] if title.startswith("norm") is False else LINE
            spot = (x + a * size, 9, (b - a) * size, size) if columns else (x, 9 + (1 - b) * size, size, (b - a) * size)
            axes.add_patch(_rectangle(spot, colour))
            label = f"{rank}" if colour != LINE else "all ranks"
            axes.text(
                spot[0] + spot[2] / 2, spot[1] + spot[3] / 2, label, ha="center", va="center", color=PAPER, fontsize=8
            )
        axes.text(x + size / 2, 7, title, ha="center", va="top", fontsize=8, color=INK)
    axes.text(2, 27, "numbers: the rank that holds it; tp_size 3", fontsize=9, color=SOFT)
    return figure


def _rectangle(spot: tuple[float, float, float, float], colour: str) -> Any:
    from matplotlib.patches import Rectangle

    x, y, width, height = spot
    return Rectangle((x, y), width, height, fc=colour, ec=PAPER, lw=1)


def units() -> Any:
    """Eight ranks at tp_size 4, as torch counts them and as the script does."""
    figure, axes = _canvas(8.6, 2.9)
    for unit in range(2):
        x = 2 + unit * 42
        _box(axes, x, 4, 39, 18, "", SOFT, "#f7f9fb")
        axes.text(x + 1.5, 19.5, f"process {unit} of 2, to the script: one model, one batch", fontsize=9, color=INK)
        for rank in range(4):
            _box(axes, x + 1.5 + rank * 9.4, 6, 7.8, 9, f"rank {unit * 4 + rank}\na quarter", RANKS[rank])
    _arrow(axes, (41.2, 10), (43.8, 10), LINE, arrowstyle="<|-|>")
    axes.text(42.5, 2.2, "gradients, once a step", ha="center", fontsize=8, color=SOFT)
    axes.text(2, 25, "num_processes: 8, tp_size: 4", fontsize=9, color=SOFT)
    return figure
