"""What each rank held and sent, as one JSON file per rank at exit (``TP_PLUGIN_REPORT=DIRECTORY``)."""

from __future__ import annotations

import atexit
import json
from pathlib import Path

from tp_plugin.runtime.runtime import current


def write_at_exit(directory: str) -> None:
    """Write ``rank<r>.json`` into ``directory`` when this process ends, if it took part in a tensor-parallel run."""
    atexit.register(_write, Path(directory))


def _write(directory: Path) -> None:
    runtime = current()
    if runtime is None:
        return
    mesh, stats = runtime.mesh, runtime.mesh.context.stats
    report = {
        "rank": mesh.rank,
        "tp_rank": mesh.tp.rank,
        "dp_rank": mesh.data.rank,
        "pp_rank": mesh.pp.rank,
        "tp_size": mesh.tp_size,
        "pp_size": mesh.pp_size,
        "dp_size": mesh.dp_size,
        "parameter_bytes": runtime.held_bytes,
        "whole_parameter_bytes": runtime.full_bytes,
        "forwards": runtime.progress.training_forwards,
        "collectives": stats.total.as_dict(),
        "training_collectives": stats.training.as_dict(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"rank{mesh.rank}.json").write_text(json.dumps(report, indent=2))
