"""Checkpoints that a stranger wrote: their names do not leave the folder, and their pickles run nothing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_plugin.checkpoint import safe_pickle
from tp_plugin.cli.main import main
from tp_plugin.errors import TPError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_PLUGIN_DISABLE", "1")  # which main() sets, for good


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


def deepspeed_folder(root: Path, **more: Any) -> Path:
    folder = root / "checkpoint"
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    state = {"module": {"weight": torch.ones(2, 3)}, "optimizer": None, "ds_config": {}, **more}
    state |= {"mp_world_size": 1, "dp_world_size": 1}
    torch.save(state, folder / "global_step1" / "mp_rank_00_model_states.pt")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says when it fails."""
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def distributed_folder(root: Path) -> Path:
    """What FSDP2 saves sharded, of one tensor."""
    import torch.distributed.checkpoint as dcp

    folder = root / "checkpoint" / "pytorch_model_fsdp_0"
    dcp.save({"model.weight": torch.arange(6.0).view(2, 3)}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("kind", ["deepspeed", "weights", "metadata"])
def test_a_pickle_is_not_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "checkpoint"
    if kind == "deepspeed":
        deepspeed_folder(tmp_path, mine=Malice(victim))
    if kind == "weights":
        folder.mkdir()
        torch.save({"weight": torch.ones(2), "mine": Malice(victim)}, folder / "pytorch_model.bin")
    if kind == "metadata":
        (distributed_folder(tmp_path) / ".metadata").write_bytes(pickle.dumps(Malice(victim)))
    for command in (["export"], ["reshard", "--tp", "1"]):
        error = refused(capsys, *command, folder, tmp_path / "out")
        assert f"{os.name}.mkdir" in error or "posix.mkdir" in error
        assert "--trust" in error and "add_safe_globals" in error
        assert not victim.exists() and not (tmp_path / "out").exists()
    main(["export", str(folder), str(tmp_path / "out"), "--trust"])
    assert victim.is_dir(), "the test's pickle does nothing at all"


def test_a_raw_pickle_under_a_checkpoints_name_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "victim")))
    refused(capsys, "export", tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "victim").exists()


def test_a_class_that_is_not_known_is_named_and_may_be_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line with --trust, in a script by torch's own list of safe classes."""
    folder = deepspeed_folder(tmp_path, client=Fraction(1, 3))
    assert "uses fractions.Fraction, which could run any code" in refused(capsys, "export", folder, tmp_path / "out")
    assert main(["export", str(folder), str(tmp_path / "out"), "--trust"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], torch.ones(2, 3))
    assert main(["reshard", str(folder), str(tmp_path / "resharded"), "--tp", "1", "--trust"]) == 0
    file = folder / "global_step1" / "mp_rank_00_model_states.pt"
    with pytest.raises(TPError, match=r"add_safe_globals\(\[Fraction\]\)"):
        safe_pickle.load(file)
    with torch.serialization.safe_globals([Fraction]):
        assert safe_pickle.load(file)["client"] == Fraction(1, 3)


def test_what_deepspeed_and_accelerate_write_needs_no_trust(tmp_path: Path) -> None:
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    numbers = np.random.get_state()
    saved = {
        "scalers": [LossScaler(scale=2.0), DynamicLossScaler(2.0**8, 2.0, 1000, 1.0, 2, False, torch.float16)],
        "zero_stage": ZeroStageEnum.weights,
        "mapping": fragment_address(start=3, numel=4),
        "args": argparse.Namespace(lr=1e-3),
        "epoch": np.float64(1.5),
        "numbers": numbers,
        "tensor": torch.arange(3),
    }
    torch.save(saved, tmp_path / "file.pt")
    allowed = torch.serialization.get_safe_globals()
    found = safe_pickle.load(tmp_path / "file.pt")
    assert [vars(one) for one in found["scalers"]] == [vars(one) for one in saved["scalers"]]
    assert found["zero_stage"] is ZeroStageEnum.weights and found["mapping"] == saved["mapping"]
    assert found["args"].lr == 1e-3 and found["epoch"] == 1.5 and torch.equal(found["tensor"], saved["tensor"])
    assert (found["numbers"][1] == numbers[1]).all()
    assert set(torch.serialization.get_safe_globals()) == set(allowed), "what is allowed here is not allowed everywhere"


def test_generators_of_a_state_are_not_run(tmp_path: Path) -> None:
    """What a process reads that was not there when the state was saved."""
    from tp_plugin.engines.accelerate.save_state import _take_step

    process = argparse.Namespace(process_index=3, step=0)
    with pytest.warns(UserWarning, match="no generators of process 3"):
        torch.save({"step": 5, "random_state": (3, (1, 2), None)}, tmp_path / "random_states_0.pkl")
        _take_step(process, tmp_path)
    assert process.step == 5
    torch.save({"step": Malice(tmp_path / "victim")}, tmp_path / "random_states_0.pkl")
    with pytest.raises(TPError, match=r"random_states_0\.pkl is a pickle that uses"):
        _take_step(process, tmp_path)
    assert not (tmp_path / "victim").exists()


def test_distributed_metadata_are_read_and_names_in_them_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = distributed_folder(tmp_path)
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], torch.arange(6.0).view(2, 3))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (place,) = metadata.storage_data.values()
    place.relative_path = "../../secret.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "'../../secret.distcp'" in refused(capsys, "export", tmp_path / "checkpoint", tmp_path / "other")


ELSEWHERE = pytest.mark.parametrize("kind", ["..", "absolute", "link"])


def outside(kind: str, folder: Path, victim: Path) -> str:
    """A name that leads from ``folder`` to ``victim`` beside it."""
    if kind == "link":
        (folder / "link").symlink_to(victim)
    return {"..": f"../{victim.name}", "absolute": str(victim), "link": "link"}[kind]


@ELSEWHERE
def test_an_index_that_names_files_elsewhere(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, victim = tmp_path / "checkpoint", tmp_path / "secret.safetensors"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, victim)
    name = outside(kind, folder, victim)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    assert name in refused(capsys, "export", folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "index.json is damaged" in refused(capsys, "export", folder, tmp_path / "out")


@ELSEWHERE
def test_a_tag_elsewhere(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = deepspeed_folder(tmp_path)
    victim = tmp_path / "secret"
    (folder / "global_step1").rename(victim)
    (folder / "latest").write_text(name := outside(kind, folder, victim))
    assert name in refused(capsys, "export", folder, tmp_path / "out")
    assert name in refused(capsys, "reshard", folder, tmp_path / "out", "--tp", "1")


@pytest.mark.parametrize("command", [["export"], ["reshard", "--tp", "2"]], ids=["export", "reshard"])
def test_an_unfinished_checkpoint_that_overwrites_files_elsewhere(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, victim = tmp_path / "checkpoint", tmp_path / "authorized_keys"
    (folder / ".unfinished").mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    victim.write_text("mine")
    (folder / "authorized_keys").write_text("theirs")  # which is `.unfinished/../authorized_keys`
    text = json.dumps({"format": 1, "files": {"../authorized_keys": 6}})
    (folder / ".unfinished" / "tp_plugin_state.json").write_text(text)
    assert "'../authorized_keys'" in refused(capsys, *command, folder, tmp_path / "out")
    assert victim.read_text() == "mine" and (folder / "authorized_keys").exists()


@pytest.mark.parametrize("command", [["export"], ["reshard", "--tp", "2"]], ids=["export", "reshard"])
def test_what_links_lead_to_is_not_copied(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, secret = tmp_path / "checkpoint", tmp_path / "id_rsa"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    secret.write_text("secret")
    (folder / "tokenizer.json").symlink_to(secret)
    assert "tokenizer.json is a link that leads outside" in refused(capsys, *command, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = deepspeed_folder(tmp_path)
    for text in ("{", "[]", '{"tp_size": 1, "dp_size": 1, "layouts": {"weight": {"shape": 3}}}'):
        (folder / "global_step1" / "tp_plugin.json").write_text(text)
        assert "tp_plugin.json is damaged" in refused(capsys, "export", folder, tmp_path / "out")
