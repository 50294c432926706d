"""Checkpoint folders that are complete or not there: files are written aside and moved in when all are written.

    folder/.unfinished/      what is being written; a process that dies leaves the folder's earlier contents untouched
    folder/.unfinished/tp_plugin_state.json   written last: from here on the files are moved in, by whoever comes next
    folder/tp_plugin_state.json               moved last: names and sizes of all files, and what saved them

No torch.distributed: offline tools use it, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from tp_plugin.checkpoint.safe_paths import inside
from tp_plugin.errors import TPError

ASIDE = ".unfinished"
MANIFEST = "tp_plugin_state.json"
FORMAT = 1


def begin(folder: Path) -> Path:
    """Prepare to save into ``folder``: an empty folder inside it, into which all files are to be written.

    What an earlier process left there is moved in if it was complete, else removed. Processes of several machines may
    call this at once.

    Returns:
        ``folder/.unfinished``.

    Raises:
        TPError: the manifest of what was left is damaged, or names a file outside ``folder``.
    """
    recover(folder)
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def abandon(folder: Path) -> None:
    """Remove what :func:`begin` made, and ``folder`` too if it holds nothing else."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def finish(folder: Path, about: dict[str, Any]) -> None:
    """Seal what was written since :func:`begin`, and move it into ``folder``.

    Args:
        about: what saved the checkpoint, as JSON; it goes into the manifest (:func:`read_manifest`).
    """
    describe(folder / ASIDE, about)
    recover(folder)


def describe(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest of all files in ``folder``: their names and sizes, and ``about``."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps({"format": FORMAT, **about, "files": sizes}), encoding="utf-8")
    os.replace(draft, folder / MANIFEST)


def recover(folder: Path) -> None:
    """Move in what was completely written, if a process died before it did so.

    Any number of processes may do it at once, or again.

    Raises:
        TPError: the manifest is damaged, or names a file outside ``folder``; then nothing is moved.
    """
    aside = folder / ASIDE
    sealed = read_manifest(aside)
    if sealed is None:
        return
    moves = []
    for name in (*sealed["files"], MANIFEST):
        target = inside(folder, name, aside / MANIFEST)
        moves.append((inside(folder, f"{ASIDE}/{name}", aside / MANIFEST), target))
    for source, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it is there already
            os.replace(source, target)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What saved the checkpoint, and ``files``: each file's size by its name. None if this plugin did not save it.

    Raises:
        TPError: it is damaged, or was written by a newer version.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TPError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise TPError(f"{folder / MANIFEST} is damaged: expected a JSON object, found {type(found).__name__}")
    if found.get("format") != FORMAT:
        raise TPError(f"{folder / MANIFEST} has format {found.get('format')}; this version reads format {FORMAT}")
    if not isinstance(found.get("files"), dict):
        raise TPError(f"{folder / MANIFEST} is damaged: it has no list of files")
    return found


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint; empty for one that this plugin did not save.

    Raises:
        TPError: its saving was interrupted, a file is missing or truncated, or the manifest names a file outside
            ``folder``; the message names the file.
    """
    manifest = read_manifest(folder)
    if (folder / ASIDE).exists():
        earlier = any(path.name != ASIDE for path in folder.iterdir())
        if not earlier:
            raise TPError(
                f"checkpoint {folder} is not complete: the run that saved it ended in the middle; resume from an "
                "earlier one"
            )
        warnings.warn(f"a run that saved into {folder} ended in the middle; its earlier state is loaded", stacklevel=2)
    for name, size in (manifest or {}).get("files", {}).items():
        path = inside(folder, name, folder / MANIFEST)
        if not path.is_file():
            raise TPError(f"checkpoint {folder} is not complete: {name} is missing")
        found = path.stat().st_size
        if found != size and not _is_whole(path):  # the script may have put another file in its place
            raise TPError(f"checkpoint {folder} is damaged: {name} has {found} bytes, it was saved with {size}")
    return manifest or {}


def is_complete(folder: Path) -> bool:
    """Whether :func:`check` passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(folder)
    except TPError:
        return False
    return True


def _is_whole(path: Path) -> bool:
    """Whether the file's own format says that nothing of it is missing."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > path.stat().st_size:
                return False
            try:
                header = json.loads(file.read(length))
            except ValueError:
                return False
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    return path.suffix in (".bin", ".pt", ".pth", ".pkl") and zipfile.is_zipfile(path)
