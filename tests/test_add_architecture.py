"""The docs' page "Add an architecture", done as it says: its files, its commands, its output, its three mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Fence(NamedTuple):
    """A fenced block of the section: its language and its text."""

    kind: str
    text: str


def section() -> list[Fence]:
    walk = (ROOT / "docs" / "howto" / "add-architecture.md").read_text(encoding="utf-8")
    fences = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", walk, re.DOTALL | re.MULTILINE)
    # a fence in a list is indented
    return [Fence(kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, kind, text in fences]


FENCES = section()
COMMANDS = next(fence.text for fence in FENCES if fence.kind == "sh").splitlines()
OUTPUTS = [fence.text for fence in FENCES if fence.kind == "text"]
MISTAKES = [(FENCES[at].text, FENCES[at + 1].text) for at, fence in enumerate(FENCES) if fence.kind == "diff"]


def written() -> dict[str, str]:
    """The files that the section has one write, by the path in their first line."""
    files = [fence.text for fence in FENCES if fence.kind in ("toml", "python")]
    return {text.splitlines()[0].removeprefix("# "): text for text in files}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has the package installed, in place of the environment's."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "examples" / "sprig", source, dirs_exist_ok=True)
    for path, text in written().items():
        (source / path).write_text(text, encoding="utf-8")
    pip, *arguments = COMMANDS[0].split()
    assert pip == "pip"
    command = [sys.executable, "-m", "pip", "--quiet", *arguments, "--target", str(target)]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    return target


def tp_plugin(installed: Path, command: str) -> tuple[int, str]:
    """Exit status and output of a command line, without the line breaks that a narrow terminal makes."""
    program, *arguments = command.split()
    run = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return run.returncode, run.stdout


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def says(output: str, shown: str) -> None:
    """Assert that ``output`` has what the docs show; ``…`` stands for anything."""
    pattern = ".*?".join(re.escape(squeezed(part)) for part in shown.split("…"))
    assert re.search(pattern, squeezed(output)), f"expected:\n{shown}\nprinted:\n{output}"


def test_the_package_is_small() -> None:
    files = written()
    assert set(files) == {"pyproject.toml", "sprig/tp.py"}
    assert sum(len(text.splitlines()) for text in files.values()) < 40


def test_dry_run(installed: Path) -> None:
    status, output = tp_plugin(installed, COMMANDS[1])
    assert status == 0
    says(output, OUTPUTS[0])


def test_proof(installed: Path) -> None:
    status, output = tp_plugin(installed, COMMANDS[2])
    assert status == 0, output
    says(output, OUTPUTS[1])


@pytest.mark.parametrize("number", range(3))
def test_mistake(installed: Path, number: int) -> None:
    assert len(MISTAKES) == 3
    (change, message), policy = MISTAKES[number], installed / "sprig" / "tp.py"
    right = policy.read_text(encoding="utf-8")
    minus = "".join(line[1:] for line in change.splitlines(keepends=True) if line.startswith("-"))
    plus = "".join(line[1:] for line in change.splitlines(keepends=True) if line.startswith("+"))
    assert right.count(minus) == 1
    try:
        policy.write_text(right.replace(minus, plus), encoding="utf-8")
        status, output = tp_plugin(installed, COMMANDS[2])
    finally:
        policy.write_text(right, encoding="utf-8")
    assert status == 1, output
    says(output, message)
