"""A checkpoint folder is the earlier one or the later one, wherever the process that saves into it dies."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tp_plugin.checkpoint import atomic_dir
from tp_plugin.errors import TPError

NAMES = ("model.safetensors", "optimizer.bin", "pytorch_model/shard.pt", "random_states_0.pkl")


class Killed(BaseException):
    """No handler for ordinary errors runs when a process is killed."""


def save(folder: Path, content: str) -> None:
    aside = atomic_dir.begin(folder)
    for name in NAMES:
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text(content)
    atomic_dir.finish(folder, {"engine": "DDP"})


def load(folder: Path) -> str:
    atomic_dir.recover(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert atomic_dir.check(folder)["engine"] == "DDP"
    (content,) = {(folder / name).read_text() for name in NAMES}
    return content


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_anywhere(earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for moment in range(30):
        folder = tmp_path / str(moment)
        if earlier:
            save(folder, "earlier")
            (folder / "of the script").write_text("")
        calls = 0

        def counted(original, *args, moment=moment, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "write_text"), (Path, "mkdir"), (atomic_dir.shutil, "rmtree")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, original=original, **k: counted(original, *a, **k))
            try:
                save(folder, "later")
                break
            except Killed:
                pass
        try:
            outcomes.append(load(folder))
        except (TPError, KeyError, FileNotFoundError) as error:
            assert not earlier, f"killed at {moment}: {error}"
            if (folder / atomic_dir.ASIDE).is_dir():
                with pytest.raises(TPError, match="the run that saved it ended in the middle"):
                    atomic_dir.check(folder)
            outcomes.append("nothing")
        assert not earlier or (folder / "of the script").exists()
        save(folder, "again")  # what was left does not stand in the way
        assert load(folder) == "again" and not (folder / atomic_dir.ASIDE).exists()
    assert calls > 12
    first = "earlier" if earlier else "nothing"
    assert set(outcomes) == {first, "later"}
    assert outcomes == sorted(outcomes, key=["earlier", "nothing", "later"].index), "it went back and forth"


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    aside = atomic_dir.begin(tmp_path / "state")
    save_file({"w": torch.arange(6.0)}, aside / "model.safetensors")
    torch.save({"step": torch.arange(300)}, aside / "optimizer.bin")
    atomic_dir.finish(tmp_path / "state", {})
    for name in ("model.safetensors", "optimizer.bin"):
        path = tmp_path / "state" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TPError, match=f"is damaged: {name} has {len(whole) // 2} bytes"):
            atomic_dir.check(tmp_path / "state")
        path.unlink()
        with pytest.raises(TPError, match=f"is not complete: {name} is missing"):
            atomic_dir.check(tmp_path / "state")
        path.write_bytes(whole)
    save_file({"w": torch.arange(9.0)}, tmp_path / "state" / "model.safetensors")  # by the script, which may do so
    atomic_dir.check(tmp_path / "state")


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / atomic_dir.MANIFEST).write_text("{")
    with pytest.raises(TPError, match="is damaged"):
        atomic_dir.check(tmp_path)
    (tmp_path / atomic_dir.MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(TPError, match="this version reads format 1"):
        atomic_dir.check(tmp_path)


def test_others_checkpoints_are_not_judged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    assert atomic_dir.check(tmp_path) == {}


@pytest.mark.parametrize("kind", ["..", "absolute", "link to a folder", "link to a file", "number"])
def test_a_manifest_that_names_files_elsewhere_moves_nothing(kind: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "a" / "state", tmp_path / "elsewhere"
    aside = atomic_dir.begin(folder)
    elsewhere.mkdir()
    victim = elsewhere / "authorized_keys"
    victim.write_text("mine")
    (aside / "first.bin").write_text("harmless")
    name: str = {"..": "../../elsewhere/authorized_keys", "absolute": str(victim)}.get(kind, "in/authorized_keys")
    if kind == "link to a folder":
        (folder / "in").symlink_to(elsewhere)
    if kind == "link to a file":
        (aside / "in").mkdir()
        (aside / "in" / "authorized_keys").symlink_to(victim)
    elif kind != "number":
        source = Path(os.path.normpath(aside / name)) if kind == ".." else aside / name
        if kind != "absolute" and source != victim:
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("theirs")
    files = {"first.bin": 8, name: 6}
    text = json.dumps({"format": 1, "files": files if kind != "number" else [7]})
    (aside / atomic_dir.MANIFEST).write_text(text)
    with pytest.raises(TPError, match="damaged" if kind == "number" else "authorized_keys"):
        atomic_dir.recover(folder)
    assert victim.read_text() == "mine"
    assert (aside / "first.bin").exists() and not (folder / "first.bin").exists(), "something was moved"


def test_a_manifest_in_place_that_names_files_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "state", "x")
    manifest = tmp_path / "state" / atomic_dir.MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": {"../secret": 3}}))
    with pytest.raises(TPError, match=r"names the file '\.\./secret', which is outside"):
        atomic_dir.check(tmp_path / "state")


def test_a_checkpoint_that_is_reached_through_a_link(tmp_path: Path) -> None:
    """Links inside a checkpoint, and to it, are the user's business."""
    save(tmp_path / "state", "x")
    (tmp_path / "state" / "latest.bin").symlink_to("optimizer.bin")
    (tmp_path / "link").symlink_to(tmp_path / "state")
    atomic_dir.describe(tmp_path / "link", {"engine": "DDP"})
    assert "latest.bin" in atomic_dir.check(tmp_path / "link")["files"]
    save(tmp_path / "link", "later")
    assert load(tmp_path / "state") == "later"
