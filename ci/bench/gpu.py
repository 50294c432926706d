#!/usr/bin/env python
"""Everything that only a card can show, one part after the other; writes ci/bench/results/gpu.json and gpu.md.

Parts: decoder layers of Llama's shapes as one rank of tp 8 (gpu_layer.py), a whole 8B rank's step (gpu_rank.py), every
way to train against one process by the numbers (gpu_parity.py), the loss kernel (gpu_loss.py). A part that fails or
takes too long is reported, and the others run.

    bash ci/gpu.sh                # on a machine with a card; under ten minutes
    bash ci/gpu.sh --rehearse     # every line of it on CPU, small; writes to a temporary folder
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT = ["--device", "cpu"]
PARTS: dict[str, tuple[str, list[str], list[str], int]] = {
    "parity": ("gpu_parity.py", [], SHORT, 300),
    "rank": ("gpu_rank.py", [], [*SHORT, "--tiny", "--tokens", "16"], 150),
    "loss": ("gpu_loss.py", [], [*SHORT, "--tiny"], 60),
    "layer": ("gpu_layer.py", [], [*SHORT, "--tiny", "--rounds", "1", "--no-compile"], 150),
}
"""Part → its program, its arguments on a card and at a rehearsal, and its seconds on a card."""
REHEARSED = ["--only", "plain loop,ZeRO 3,LoRA,saved and resumed"]
"""The rest of the cases run on CPU in the tests."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run; default all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    card = None if args.rehearse else about_card()
    if card is None and not args.rehearse:
        sys.exit("ci/gpu.sh: torch sees no card on this machine; `bash ci/gpu.sh --rehearse` runs every line on CPU")
    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-")) if args.rehearse else HERE / "results")
    report: dict[str, Any] = {"about": {"card": card, **about()}, "parts": {}}
    for name in args.only or PARTS:
        report["parts"][name] = run(name, args.rehearse)
        write(out, report)  # what was found so far outlives a run that is stopped
    print(markdown(report))
    print(f"written to {out / 'gpu.json'} and {out / 'gpu.md'}")
    sys.exit(1 if any(part["status"] for part in report["parts"].values()) else 0)


def run(name: str, rehearse: bool) -> dict[str, Any]:
    """The last line of a part's output, which is JSON, its exit status, and how long it took."""
    program, full, small, seconds = PARTS[name]
    command = [sys.executable, str(HERE / program), *(small if rehearse else full)]
    if rehearse and name == "parity":
        command += REHEARSED
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600 if rehearse else seconds)
        output, status = done.stdout, done.returncode
        tail = (done.stdout + done.stderr)[-3000:]
    except subprocess.TimeoutExpired as error:
        output, status, tail = str(error.stdout or ""), 124, f"took longer than {seconds} s"
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        found = None
    status = status or int(found is None)
    print("\n".join(lines[:-1]), flush=True)
    return {"status": status, "seconds": time.monotonic() - began, "found": found, "tail": tail if status else ""}


def about_card() -> dict[str, Any] | None:
    """The first card, and how many there are."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except OSError:
        driver = "unknown"
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "name": torch.cuda.get_device_name(),
        "memory": memory,
        "cards": torch.cuda.device_count(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def about() -> dict[str, Any]:
    """Date, versions and commit."""
    import importlib.metadata

    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    versions = {}
    for name in ("torch", "transformers", "accelerate", "deepspeed", "peft", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    today = datetime.date.today().isoformat()
    return {"date": today, "commit": commit.stdout.strip(), "python": platform.python_version(), "versions": versions}


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    found, parts = report["about"], report["parts"]
    card = found["card"]
    where = (
        "a rehearsal on CPU, no card" if card is None else f"{card['cards']} x {card['name']}, driver {card['driver']}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    lines = ["# On a card", "", f"{found['date']}, commit {found['commit']}: {where}. {versions}.", ""]
    lines += ["| part | | seconds |", "|---|---|---|"]
    lines += [
        f"| {name} | {'failed' if part['status'] else 'ok'} | {part['seconds']:.0f} |" for name, part in parts.items()
    ]
    for name, part in parts.items():
        if part["found"]:
            lines += ["", f"## {name}", "", *TABLES[name](part["found"])]
        if part["status"]:
            lines += ["", "```", part["tail"].strip(), "```"]
    return "\n".join([*lines, ""])


def _parity(found: dict[str, Any]) -> list[str]:
    lines = [f"Ranks talk by `{found['backend']}`.", "", "| | loss | norm | weights | |", "|---|---|---|---|---|"]
    for name, case in found["cases"].items():
        apart = case.get("apart", {})
        numbers = " | ".join(f"{apart[key]:.1e}" if key in apart else "" for key in ("loss", "norm", "weights"))
        verdict = "failed" if "failed" in case else f"wrong: {case['wrong']}" if case.get("wrong") else "ok"
        lines.append(f"| {name} | {numbers} | {'left out' if case.get('left out') else verdict} |")
    return lines


def _rank(found: dict[str, Any]) -> list[str]:
    lines = ["| tokens | ms | card busy, ms | kernels | host waits | peak, GB |", "|---|---|---|---|---|---|"]
    for tokens, each in found["tokens"].items():
        busy, peak = each["busy milliseconds"], each["peak bytes"]
        waits = "" if each["host waits"] is None else f"{len(each['host waits'])} {sorted(set(each['host waits']))}"
        lines.append(
            f"| {tokens} | {each['milliseconds']:.1f} | {busy if busy is None else format(busy, '.1f')} | "
            f"{each['kernels']} | {waits} | {peak if peak is None else format(peak / 1e9, '.2f')} |"
        )
    return lines


def _loss(found: dict[str, Any]) -> list[str]:
    return ["```", json.dumps(found, indent=1), "```"]


def _layer(found: dict[str, Any]) -> list[str]:
    import gpu_layer

    return gpu_layer.markdown(found).splitlines()[2:]


TABLES = {"parity": _parity, "rank": _rank, "loss": _loss, "layer": _layer}


if __name__ == "__main__":
    main()
