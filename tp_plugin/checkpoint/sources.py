"""The weights in a checkpoint of any engine as whole tensors, one at a time.

DeepSpeed                       a folder with tags (engines/deepspeed/files.py), save_state's and Trainer's included
save_state, Trainer under DDP   model.safetensors, in files with an index or not; pytorch_model.bin
FSDP2, sharded                  pytorch_model_fsdp_0/: torch's distributed checkpoint, in whole-model coordinates
FSDP2, full                     pytorch_model_fsdp.bin
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tp_plugin.checkpoint import atomic_dir
from tp_plugin.checkpoint.deepspeed_files import Checkpoint
from tp_plugin.checkpoint.folders import find_tag, has_tags
from tp_plugin.errors import TPError

SHARDED, FULL = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


@dataclass
class Source:
    """Weights by name, each read when it is asked for.

    Attributes:
        kind: how to call it in a message.
        aliases: names that are another's second name (tied weights), with the first one.
        config: the model's config, where the checkpoint has it.
        deepspeed: the reader of a DeepSpeed checkpoint.
    """

    folder: Path
    kind: str
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    names: list[str]
    aliases: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    deepspeed: Checkpoint | None = None


def find(folder: Path, tag: str | None) -> Source:
    """The checkpoint in ``folder``.

    Raises:
        TPError: none, an incomplete or a damaged one; the message names the file.
    """
    if not folder.is_dir():
        raise TPError(f"{folder} is not a folder")
    atomic_dir.recover(folder)
    about = atomic_dir.check(folder)
    if tag is not None or has_tags(folder):
        return _deepspeed(Checkpoint(find_tag(folder, tag)))
    models = about.get("models") or [{}]
    more = {"config": models[0].get("config"), "aliases": models[0].get("aliases") or {}}
    if (folder / SHARDED / ".metadata").is_file():
        return _distributed(folder / SHARDED, **more)
    for pattern in (FULL, "*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "pytorch_model.bin"):
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("adapter_"))
        if found:
            path = next((path for path in found if path.name.startswith("model.")), found[0])
            return _files(folder, path, "FSDP2, full" if pattern == FULL else "whole weights", **more)
    if any(folder.glob("adapter_model.*")):
        raise TPError(f"{folder} holds an adapter, which PEFT loads as it is; there is no model in it")
    find_tag(folder, None)  # which says what was looked for
    raise AssertionError


def _deepspeed(source: Checkpoint) -> Source:
    names = list(source.model_state(0)["module"])
    kind = f"tp {source.tp}, dp {source.dp}"
    config = source.sidecar.get("config")
    return Source(source.folder, kind, source.masters, names, source.aliases, config, source)


def _files(folder: Path, path: Path, kind: str, **more: Any) -> Source:
    paths = [path]
    if path.name.endswith(".index.json"):
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / name for name in dict.fromkeys(listed.values())]
    for each in paths:
        if not each.is_file():
            raise TPError(f"checkpoint {folder} is not complete: {each.name} is missing")
    names = [name for each in paths for name in _open(each)]
    prefix = "module." if all(name.startswith("module.") for name in names) else ""  # what DDP puts before them

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for each in paths:
            for name, read in _open(each).items():
                yield name.removeprefix(prefix), read()

    return Source(folder, kind, tensors, [name.removeprefix(prefix) for name in names], **more)


def _open(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Readers of a file's tensors by name; neither kind of file is read before they are called."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {name: lambda name=name: state[name] for name, v in state.items() if isinstance(v, torch.Tensor)}
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise TPError(f"checkpoint file {path} cannot be read ({error}); it is truncated or damaged") from error


def _distributed(folder: Path, **more: Any) -> Source:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader: Any = dcp.FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise TPError(f"{folder / '.metadata'} cannot be read ({error}); it is truncated or damaged") from error
    entries = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, entry in entries.items():
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            try:
                dcp.load({key: tensor}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
            except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
                raise TPError(f"{key!r} cannot be read from {folder} ({error}); a file is missing or damaged") from None
            yield key.removeprefix("model."), tensor

    # the state dict stands under the key "model", whose own names may begin so, too
    names = [key.removeprefix("model.") for key in entries]
    return Source(folder, "FSDP2, sharded", tensors, names, **more)
