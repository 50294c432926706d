"""Run several scripts one after the other in one process: importing torch costs more than all of them together."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--scripts", required=True)
parser.add_argument("--out", type=Path, required=True)
options, rest = parser.parse_known_args()

failed = []
for name in options.scripts.split(","):
    out = options.out / name
    out.mkdir(exist_ok=True)
    sys.argv = [f"{name}.py", "--out", str(out), *rest]
    try:
        runpy.run_path(str(Path(__file__).parent / f"{name}.py"), run_name="__main__")
    except Exception:
        failed.append(name)
        (out / f"error.rank{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
        traceback.print_exc()
sys.exit(f"failed: {failed}" if failed else 0)
