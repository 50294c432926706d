"""Training curves of runs that should agree, drawn where matplotlib is installed."""

from collections.abc import Mapping
from pathlib import Path

Series = Mapping[int, float]


def draw(runs: Mapping[str, Mapping[str, Series]], file: Path) -> bool:
    """Quantities of each run over its steps, and below them how far each run is from the first.

    Args:
        runs: the name of a run → of a quantity → step → value; the first run is the reference.
        file: what to write.

    Returns:
        False if there is no matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("agg")
    from matplotlib.figure import Figure

    (first, reference), *others = runs.items()
    figure = Figure(figsize=(5 * len(reference), 6), layout="constrained")
    rows = figure.subplots(2, len(reference), squeeze=False, height_ratios=(2, 1), sharex="col")
    for column, (quantity, values) in enumerate(reference.items()):
        above, below = rows[0][column], rows[1][column]
        above.plot(*zip(*values.items(), strict=True), label=first, color="0.6", linewidth=5)
        for number, (name, run) in enumerate(others):
            above.plot(*zip(*run[quantity].items(), strict=True), label=name, linewidth=1.5, color=f"C{number}")
            apart = {step: abs(run[quantity][step] - values[step]) / abs(values[step]) for step in values}
            below.semilogy(list(apart), [max(value, 1e-9) for value in apart.values()], color=f"C{number}", label=name)
        above.set_title(quantity)
        above.legend()
        below.set_title(f"relative difference to {first}", fontsize="medium")
        below.set_xlabel("step")
        below.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    return True
