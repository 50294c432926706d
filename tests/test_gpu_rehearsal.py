"""The script for a card (``ci/gpu.sh``) runs here line by line, small and on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(*args: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TP_PLUGIN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "ci" / "gpu.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def test_every_part_runs(tmp_path: Path) -> None:
    done = script("--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(parts) == {"parity", "rank", "loss", "layer"}
    cases = parts["parity"]["found"]["cases"]
    assert all("apart" in case for name, case in cases.items() if not case.get("left out"))
    text = (tmp_path / "gpu.md").read_text()
    assert "a rehearsal on CPU, no card" in text and "| plain loop |" in text and "failed" not in text


def test_without_a_card_it_says_so() -> None:
    done = script()
    assert done.returncode == 1 and "torch sees no card on this machine" in done.stderr
