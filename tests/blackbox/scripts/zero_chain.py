"""Run a list of scripts in one process: importing DeepSpeed costs more than training."""

from __future__ import annotations

import argparse
import gc
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--plan", type=Path, required=True, help="JSON: [[name, script, arguments], ...]")
parser.add_argument("--out", type=Path, required=True)
options = parser.parse_args()

failed = []
for name, script, arguments in json.loads(options.plan.read_text()):
    out = options.out / name
    out.mkdir(exist_ok=True)
    arguments = [word.replace("{out}", str(out)).replace("{root}", str(options.out)) for word in arguments]
    sys.argv = [f"{script}.py", "--out", str(out), *arguments]
    started = time.monotonic()
    try:
        runpy.run_path(str(Path(__file__).parent / f"{script}.py"), run_name="__main__")
    except Exception:
        failed.append(name)
        (out / f"error.rank{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
        traceback.print_exc()
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    gc.collect()
sys.exit(f"failed: {failed}" if failed else 0)
