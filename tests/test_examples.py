"""The parts of the examples that need no training: conversations, tables, curves."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import curves
import real_model

RUNS: dict[str, dict[str, dict[int, float]]] = {
    "1 process": {"loss": {1: 2.0, 2: 1.0}, "gradient norm": {1: 4.0, 2: 3.0}},
    "tp_size 3": {"loss": {1: 2.0, 2: 1.001}, "gradient norm": {1: 4.0, 2: 3.0}},
    "tp_size 2": {"loss": {1: 2.0, 2: 1.0}, "gradient norm": {1: 4.1, 2: 3.0}},
}


def test_conversations(tmp_path: Path) -> None:
    count = real_model.write_conversations(tmp_path / "data")
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert count == len(lines) > 40
    for line in map(json.loads, lines):
        asked, answered = line["messages"]
        assert asked["role"] == "user" and asked["content"].endswith(("?", "."))
        assert len(answered["content"]) > 80 and "\n" not in answered["content"]
    assert any(line["messages"][0]["content"] == real_model.QUESTION for line in map(json.loads, lines))


def test_what_is_said_of_the_runs() -> None:
    assert real_model.worst(RUNS, "loss") == pytest.approx(1e-3)
    assert real_model.worst(RUNS, "gradient norm") == pytest.approx(0.025)
    assert [column.header for column in real_model.table(RUNS).columns] == [
        *("step", "1 process", "tp_size 3", "|difference|", "tp_size 2", "|difference|")
    ]


def test_without_the_model_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        real_model.find_gguf()


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "curves.png"
    assert curves.draw(RUNS, file) == file.exists() == (importlib.util.find_spec("matplotlib") is not None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert not curves.draw(RUNS, tmp_path / "other.png")


def test_the_configs_are_what_doctor_finds_well(capsys: Any) -> None:
    from tp_plugin.cli.doctor import doctor

    for config in sorted((Path(real_model.__file__).parent / "configs").iterdir()):
        if "single" not in config.name:
            assert doctor(config, None, {}) == 0, f"{config.name}: {capsys.readouterr().out}"
