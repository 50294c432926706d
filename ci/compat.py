"""Run the short form of the tests with other versions of what the plugin builds on, and print a table of results.

By default the oldest and the newest supported versions, and the oldest torch with the newest rest:

    bash ci/compat.sh
    bash ci/compat.sh 'oldest transformers' 'oldest accelerate' 'oldest deepspeed'
    bash ci/compat.sh transformers=5.19.0,accelerate=1.14.0      # one more environment; the rest as the newest
    bash ci/compat.sh --torch-index https://pypi.org/simple oldest newest torch=2.14.1
    bash ci/compat.sh --only parity oldest newest

``--log`` takes up a run that was cut off; it is good for one state of the code. Environments are kept under --home,
outside the checkout. The torch that runs this script is lent to them. Another torch is installed from --torch-index,
best a place with its CPU build (PyPI's are CUDA's, some gigabytes); without one those environments are skipped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ET
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "versions.md"
BEGIN, END = "<!-- compat: written by ci/compat.sh --write -->", "<!-- /compat -->"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
OLDEST = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.13.0", "deepspeed": "0.19.0"}
NEWEST = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "deepspeed": "0.19.8"}
TOGETHER = (
    *("peft", "trl>=1.16,<1.17", "setuptools>=77", "wheel"),
    *("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "rich>=13"),
)
"""What every environment has besides, in the newest version that fits."""

PROVEN = "llama qwen3 phi3 gpt2 falcon bert t5 mixtral deepseek_v3"
PARTS = {
    "policies": ["tests/test_zoo.py", "-k", "fits"],
    "parity": [f"tests/test_zoo.py::test_proof[{model_type}-plain-tp2]" for model_type in PROVEN.split()],
    "patches": ["tests/test_patches.py"],
    "launch": ["tests/blackbox/test_loop.py", "-k", "llama-tp2dp2 or gpt2-tp2dp1"],
    "zero": ["tests/test_zero.py::test_fp32[(2, 2)-2-llama]", "tests/test_zero.py::test_fp32[(2, 1)-3-llama]"],
}
"""The short form: arguments for pytest."""


def combinations(wanted: list[str]) -> dict[str, dict[str, str]]:
    """Name → version of each package, for the names and ``package=version,…`` given."""
    named = {"oldest": {**OLDEST, "torch": NEWEST["torch"]}, "newest": NEWEST}
    for package in PACKAGES:
        named[f"oldest {package}"] = {**NEWEST, package: OLDEST[package]}
    chosen = {}
    for item in wanted or ("oldest", "newest", "oldest torch"):
        if item in named:
            chosen[item] = named[item]
            continue
        pairs = dict(pair.split("=", 1) for pair in item.split(",") if "=" in pair)
        if not pairs or set(pairs) - set(PACKAGES):
            raise SystemExit(
                f"{item!r}: write one of {', '.join(named)}, or package=version,... of {', '.join(PACKAGES)}"
            )
        chosen[item] = {**NEWEST, **pairs}
    return chosen


def environment(home: Path, versions: dict[str, str], torch_index: str | None) -> Path:
    """The Python of an environment with these versions, made if it is not there yet.

    Raises:
        RuntimeError: what cannot be had, and why.
    """
    folder = home / "-".join(f"{package}{versions[package]}" for package in PACKAGES)
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    lent = version("torch").split("+")[0] == versions["torch"]
    if not lent and torch_index is None:
        raise RuntimeError(
            f"torch {versions['torch']} is not here (this Python has {version('torch')}); name a place with its CPU "
            "build by --torch-index"
        )
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if lent:
        lend_torch(folder)
    else:
        _run([*install, f"torch=={versions['torch']}", "--index-url", torch_index or ""], folder)
    _run([*install, *(p for p in TOGETHER if p.startswith(("setuptools", "wheel")))], folder)
    pinned = [f"{package}=={versions[package]}" for package in PACKAGES]
    # torch is pinned to what is there; DeepSpeed's build looks at it, so it must not be built apart
    _run([*install, "--no-build-isolation", *pinned, *TOGETHER, "-e", str(ROOT)], folder)
    (folder / "complete").touch()
    return python


def take_up(python: Path) -> str:
    """Install this checkout, in place of another's that a kept environment may have; the build of torch that is there.

    Raises:
        RuntimeError: pip failed, or torch cannot be imported.
    """
    folder = python.parent.parent
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], folder)
    ask = subprocess.run([str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if ask.returncode:
        raise RuntimeError(f"torch cannot be imported: {ask.stderr.strip().splitlines()[-1]}")
    return ask.stdout.strip()


def lend_torch(folder: Path) -> None:
    """Let an environment see this Python's torch, and nothing else that is installed here."""
    lent = folder / "torch"
    lent.mkdir()
    tops = {
        Path(file.parts[0]) for file in distribution("torch").files or () if file.parts[0] not in ("..", "__pycache__")
    }
    for top in tops:
        (lent / top).symlink_to(Path(str(distribution("torch").locate_file(top))).resolve())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{lent}\n", encoding="utf-8")
    torchrun = folder / "bin" / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m torch.distributed.run "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"pip failed: {' / '.join(done.stdout.strip().splitlines()[-3:])}")


def test(python: Path, arguments: list[str]) -> str:
    """Run a part; what the table says of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-m", "", f"--junitxml={report}", "-p", "no:cacheprovider"]
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        settings = {**os.environ, "PATH": path, "PYTHONPATH": "", "VIRTUAL_ENV": str(python.parent.parent)}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
        if not report.exists():
            print(done.stdout, file=sys.stderr)
            return f"pytest failed ({done.returncode})"
        suite = next(iter(ET.parse(report).getroot().iter("testsuite")))
    total, bad = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    if bad or not total:
        print(done.stdout, file=sys.stderr)
    return f"{bad} of {total} failed" if bad else f"{total} passed" if total else "no tests"


def main() -> int:
    """Exit status: 0 if nothing failed and something ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", help="oldest, newest, 'oldest PACKAGE', or PACKAGE=VERSION,...")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "tp-plugin-compat")
    parser.add_argument("--torch-index", help="package index with the CPU builds of other torch versions")
    parser.add_argument("--log", type=Path, help="take what passed from, and append it to, this file (JSON lines)")
    parser.add_argument("--write", action="store_true", help="put the table into the docs, if nothing failed")
    arguments = parser.parse_args()
    parts = {name: PARTS[name] for name in arguments.only or PARTS}
    done: dict[tuple[str, str], str] = {}
    if arguments.log and arguments.log.exists():
        lines = map(json.loads, arguments.log.read_text(encoding="utf-8").splitlines())
        done = {(name, part): result for name, part, result in lines}
    table, skipped, failed = [], [], False
    for name, versions in combinations(arguments.environments).items():
        try:
            python = environment(arguments.home.resolve(), versions, arguments.torch_index)
            versions = {**versions, "torch": take_up(python)}
        except RuntimeError as error:
            skipped.append(f"{name}: {error}")
            print(f"skipped {skipped[-1]}", file=sys.stderr)
            continue
        results = []
        for part, tests in parts.items():
            if (name, part) in done:
                results.append(done[name, part])
                continue
            results.append(test(python, tests))
            print(f"{name}, {part}: {results[-1]}", file=sys.stderr)
            if arguments.log and results[-1].endswith(" passed"):
                with arguments.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps([name, part, results[-1]]) + "\n")
        failed |= not all(result.endswith(" passed") for result in results)
        table.append([*(versions[package] for package in PACKAGES), *results])
    lines = [[*PACKAGES, *parts], ["---"] * (len(PACKAGES) + len(parts)), *table]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    shown += ["", *(f"Skipped: {reason}." for reason in skipped)] if skipped else []
    text = "\n".join([f"{datetime.date.today()}, Python {sys.version.split()[0]}, on the CPU:", "", *shown])
    print(text)
    if arguments.write and table and not failed:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    sys.exit(main())
