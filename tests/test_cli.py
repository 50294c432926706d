"""What `tp-plugin export` and `tp-plugin reshard` say of wrong arguments: exit status, message, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tp_plugin.cli.main import main


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("TP_PLUGIN_DISABLE", "1")  # which main() sets, for good


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The least that DeepSpeed would save: one process, no ZeRO, one tensor, no optimizer."""
    folder = tmp_path / "checkpoint"
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    state = {"module": {"weight": torch.ones(2, 3)}, "optimizer": None, "ds_config": {}}
    state |= {"mp_world_size": 1, "dp_world_size": 1}
    torch.save(state, folder / "global_step1" / "mp_rank_00_model_states.pt")
    return folder


COMMANDS = [["export"], ["reshard", "--tp", "1"]]
by_command = pytest.mark.parametrize("command", COMMANDS, ids=["export", "reshard"])


def fails(capsys, *arguments: object, status: int = 1) -> str:
    """Run the command; its message."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # from argparse
        code = exit.code
    printed = capsys.readouterr()
    assert code == status, printed.err
    assert not printed.out
    return printed.err


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    assert "export" in (text := capsys.readouterr().out) and "reshard" in text


def test_no_command(capsys) -> None:
    assert "required: command" in fails(capsys, status=2)


@by_command
def test_output_is_required(command, checkpoint, capsys) -> None:
    assert "required: output" in fails(capsys, *command, checkpoint, status=2)


@by_command
def test_no_such_folder(command, tmp_path, capsys) -> None:
    error = fails(capsys, *command, tmp_path / "missing", tmp_path / "out")
    assert error == f"tp-plugin {command[0]}: {tmp_path / 'missing'} is not a folder\n"
    assert not list(tmp_path.iterdir())


@by_command
def test_no_checkpoint_in_it(command, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint: no file `latest`" in fails(capsys, *command, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@by_command
def test_no_such_tag(command, checkpoint, tmp_path, capsys) -> None:
    error = fails(capsys, *command, checkpoint, tmp_path / "out", "--tag", "other")
    assert "no checkpoint 'other'; there are: global_step1" in error


@by_command
def test_latest_names_a_folder_that_is_gone(command, checkpoint, tmp_path, capsys) -> None:
    (checkpoint / "latest").write_text("global_step2")
    assert "no checkpoint 'global_step2'" in fails(capsys, *command, checkpoint, tmp_path / "out")


@by_command
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_output_exists(command, kind, checkpoint, tmp_path, capsys) -> None:
    """What is there stays as it is."""
    out = tmp_path / "out"
    held = out if kind == "file" else out / "held"
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    assert "exists already; name a new folder" in fails(capsys, *command, checkpoint, out)
    assert held.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("sizes", [["--tp", "0"], ["--tp", "-2"], ["--tp", "1", "--dp", "0"]])
def test_sizes_below_one(sizes, checkpoint, tmp_path, capsys) -> None:
    assert "expected whole numbers of at least 1" in fails(capsys, "reshard", checkpoint, tmp_path / "out", *sizes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [["--tp", "two"], ["--tp", "1", "--dp", "1.5"], []])
def test_sizes_that_are_no_numbers(sizes, checkpoint, tmp_path, capsys) -> None:
    assert "--tp" in fails(capsys, "reshard", checkpoint, tmp_path / "out", *sizes, status=2)


def test_size_that_does_not_divide(checkpoint, tmp_path, capsys) -> None:
    error = fails(capsys, "reshard", checkpoint, tmp_path / "out", "--tp", 2)
    assert "a world of 1 saved the checkpoint, which --tp 2 does not divide; name --dp, too" in error


def test_model_that_is_not_known(checkpoint, tmp_path, capsys) -> None:
    error = fails(capsys, "reshard", checkpoint, tmp_path / "out", "--tp", 2, "--dp", 1)
    assert "does not say which transformers model" in error and "--tp 1" in error


def test_unknown_dtype(checkpoint, tmp_path, capsys) -> None:
    assert "invalid choice: 'int8'" in fails(
        capsys, "export", checkpoint, tmp_path / "out", "--dtype", "int8", status=2
    )


def test_export_of_the_least(checkpoint, tmp_path, capsys) -> None:
    """The fixture is a checkpoint: an export of it succeeds, from the folder and from its tag, into an empty folder."""
    out = tmp_path / "out"
    out.mkdir()
    assert main(["export", str(checkpoint / "global_step1"), str(out)]) == 0
    assert "1 tensors" in capsys.readouterr().err
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("size", ["0", "-1"])
def test_export_refuses_a_shard_size_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--max-shard-size", size]) == 1
    assert "--max-shard-size" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["export"], ["reshard", "--tp", "1"]])
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    assert main([*command, str(tmp_path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "mp_rank_00_model_states.pt is no DeepSpeed checkpoint: it has no key 'mp_world_size'" in error


def test_an_empty_latest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").write_text("")
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "latest is empty" in capsys.readouterr().err
