"""Which folder holds the checkpoint, and an output folder that is complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tp_plugin.checkpoint.safe_paths import inside
from tp_plugin.errors import TPError


def find_tag(folder: Path, tag: str | None) -> Path:
    """The folder with the files of one DeepSpeed checkpoint: a tag of ``folder``, or ``folder`` itself.

    Args:
        folder: what was given to ``save_checkpoint``, or one of the tags in it.
        tag: the tag's name; None: the one that the file ``latest`` names, else the only one there is.

    Raises:
        TPError: there is none, or ``latest`` names one outside ``folder``; the message says what was looked for.
    """
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not tag:
            raise TPError(f"{latest} is empty; name one of {', '.join(_tags(folder)) or 'none'} with --tag")
        inside(folder, tag, latest)
    if tag is not None:
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
    """A folder to write into, which takes the name ``output`` when all is written and is removed after an exception.

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
