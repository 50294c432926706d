"""``tp-plugin doctor``: what it finds, what it advises, what a bug report holds."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from tp_plugin.cli.doctor import doctor
from tp_plugin.cli.main import main

CONFIG = "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 4\n"


def looked_at(tmp_path: Path, keys: str, capsys: pytest.CaptureFixture[str], **environ: str) -> tuple[int, str]:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + keys)
    code = doctor(path, None, environ)
    return code, " ".join(capsys.readouterr().out.split())


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = looked_at(tmp_path, "tp_size: 2\ntp_plugin: {fuse: true}\n", capsys)
    assert code == 0 and "PROBLEM" not in text, text
    assert "ok hook in `import torch`: installed" in text
    assert "config.yaml: Accelerate config, tp_size: 2, {'fuse': True}" in text
    assert "ok num_processes: 4: 2 ranks hold one model, 2 replicas" in text
    assert f"ok torch: {metadata.version('torch')}" in text


@pytest.mark.parametrize(
    ("keys", "environ", "words"),
    [
        ("tp-size: 2\n", {}, "did you mean `tp_size`?"),
        ("tp_size: 3\n", {}, "4, which tp_size: 3 does not divide → num_processes counts all"),
        ("parallelism_config: {tp_size: 2}\n", {}, "`parallelism_config.tp_size: 2` has no effect there"),
        (
            "tp_size: 2\n",
            {"TP_PLUGIN_DISABLE": "1"},
            "TP_PLUGIN_DISABLE: 1: every key is ignored → unset TP_PLUGIN_DISABLE",
        ),
        ("tp_size: 2\n", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "every key is ignored → unset TORCH_DEVICE"),
    ],
)
def test_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, environ: dict[str, str], words: str
) -> None:
    code, text = looked_at(tmp_path, keys, capsys, **environ)
    assert code == 1 and "PROBLEM" in text and words in text, text


def test_no_key_is_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = looked_at(tmp_path, "", capsys)
    assert code == 0 and "no `tp_size`: a run with it is left as it is → write `tp_size: 2` at its top level" in text
    assert looked_at(tmp_path, "", capsys, TP_PLUGIN_TP_SIZE="2")[1].count("tp_size: 2") == 1


def test_a_version_that_is_not_supported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0" if name == "transformers" else real(name))
    assert doctor(None, None, {}) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "PROBLEM transformers: 4.0 → supported are" in text and "pip install 'transformers" in text


def test_a_report_for_a_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP_PLUGIN_DISABLE", "0")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "ds.json").write_text('{"tp_size": 2, "zero_optimization": {"stage": 2}}')
    report = tmp_path / "report.txt"
    assert main(["doctor", str(tmp_path / "ds.json"), "--report", str(report)]) == 0
    text = report.read_text()
    assert "DeepSpeed config, tp_size: 2" in text and "  NCCL_DEBUG=INFO" in text and "secret" not in text
    assert "every key is ignored" not in text, "the command itself is switched off, not the user's runs"


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err
