"""File names that were read from a file (a manifest, an index, ``latest``): they must stay inside their folder.

A checkpoint may come from a stranger. A name in it such as ``../.ssh/authorized_keys``, an absolute name, or a link to
another place would make us read, copy or overwrite a file that has nothing to do with the checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath

from tp_plugin.errors import TPError


def inside(folder: Path, name: object, origin: Path) -> Path:
    """The path of ``name`` in ``folder``; the file need not exist.

    Args:
        folder: where the file lies or is to be put; it may itself be reached through a link.
        name: what was read from ``origin``, relative to ``folder``.
        origin: the file that holds ``name``, for the message.

    Raises:
        TPError: ``name`` is not a relative file name, contains ``..``, or leads out of ``folder`` through a link.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise TPError(f"{origin} names the file {name!r}; expected a file name relative to {folder}")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise TPError(
                f"{origin} names the file {name!r}, which is outside {folder}; nothing was read or moved. Checkpoints "
                "name only their own files: do not use this one unless you know who wrote it"
            )
    refuse_link_outside(folder, folder / name)
    return folder / name


def refuse_link_outside(folder: Path, path: Path) -> None:
    """Raise a TPError if ``path``, which stands in ``folder``, is reached or replaced through a link out of it."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise TPError(
            f"{path} is a link that leads outside {folder}, to {real}; nothing was read or moved. If that file belongs "
            "to the checkpoint, put a copy of it in the place of the link"
        )


def copy_inside(folder: Path, path: Path, output: Path) -> None:
    """Copy the file or folder ``path`` of the checkpoint ``folder`` to ``output``, with the contents of its links.

    Raises:
        TPError: a link leads outside ``folder``; nothing was copied.
    """
    for each in (path, *path.rglob("*")):
        refuse_link_outside(folder, each)
    if path.is_dir():
        shutil.copytree(path, output, dirs_exist_ok=True)
    else:
        shutil.copy2(path, output)
