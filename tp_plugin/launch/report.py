"""What each rank held and sent, as one JSON file per rank at exit (``TP_PLUGIN_REPORT=DIRECTORY``)."""

from __future__ import annotations

import atexit
import json
from collections import Counter
from pathlib import Path


def write_at_exit(directory: str) -> None:
    """Write ``rank<r>.json`` into ``directory`` when this process ends, if it took part in a mesh."""
    atexit.register(_write, Path(directory))


def _write(directory: Path) -> None:
    from tp_plugin.mesh.groups import current_mesh, ledger, training
    from tp_plugin.runtime.batch_guard import training_forwards
    from tp_plugin.shard.model_state import totals

    mesh = current_mesh()
    if mesh is None:
        return
    report = {
        "rank": mesh.rank,
        "tp_rank": mesh.tp.rank,
        "dp_rank": mesh.dp.rank,
        "tp_size": mesh.tp_size,
        "dp_size": mesh.dp_size,
        **totals(),
        "forwards": training_forwards(),
        "collectives": _entries(ledger),
        "training_collectives": _entries(training),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"rank{mesh.rank}.json").write_text(json.dumps(report, indent=2))


def _entries(book: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {key: {"count": count, "bytes": book["bytes"][key]} for key, count in sorted(book["count"].items())}
