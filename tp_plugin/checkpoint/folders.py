"""Where a checkpoint is, and an output folder that is there complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tp_plugin.errors import TPError


def find_tag(folder: Path, tag: str | None) -> Path:
    """The folder with the files of one checkpoint: a tag of ``folder``, or ``folder`` itself.

    Raises:
        TPError: there is none; the message says what was looked for.
    """
    if tag is None and (folder / "latest").is_file():
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if tag is not None:
        if not tag:
            raise TPError(f"{folder / 'latest'} is empty; name one of {', '.join(_tags(folder)) or 'none'} with --tag")
        if not (folder / tag).is_dir():
            raise TPError(f"{folder} has no checkpoint {tag!r}; there are: {', '.join(_tags(folder)) or 'none'}")
        return folder / tag
    if any(folder.glob("*model_states.pt")):
        return folder
    tags = _tags(folder)
    if len(tags) == 1:
        return folder / tags[0]
    if not tags:
        raise TPError(
            f"{folder} holds no checkpoint: no file `latest`, no tag of DeepSpeed's, no model or FSDP weights"
        )
    raise TPError(f"{folder} has no file `latest`; name one of its checkpoints with --tag: {', '.join(tags)}")


def has_tags(folder: Path) -> bool:
    """Whether DeepSpeed's files lie in ``folder`` or in a tag of it."""
    return (folder / "latest").is_file() or any(folder.glob("*model_states.pt")) or bool(_tags(folder))


def _tags(folder: Path) -> list[str]:
    return sorted({path.parent.name for path in folder.glob("*/*model_states.pt")})


@contextlib.contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``output`` when all is written.

    Raises:
        TPError: ``output`` exists and holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TPError(f"{output} exists already; name a new folder")
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
