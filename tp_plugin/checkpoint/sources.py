"""The weights in a checkpoint of any engine as full tensors, one at a time.

DeepSpeed                       a folder with tags (deepspeed_source.py), save_state's and Trainer's included
save_state, Trainer under DDP   model.safetensors, in files with an index or not; pytorch_model.bin
FSDP2, sharded                  pytorch_model_fsdp_0/: torch's distributed checkpoint, in whole-model coordinates
FSDP2, full                     pytorch_model_fsdp.bin
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tp_plugin.checkpoint import atomic_dir, safe_pickle
from tp_plugin.checkpoint.deepspeed_source import DeepSpeedCheckpoint
from tp_plugin.checkpoint.folders import find_tag, has_tags
from tp_plugin.checkpoint.safe_paths import inside
from tp_plugin.errors import TPError

SHARDED, FULL = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


@dataclass
class Source:
    """The weights of one checkpoint by name, each read when it is asked for.

    Attributes:
        folder: the folder with the files.
        kind: what to call it in a message.
        tensors: gives the names and full tensors, on the CPU, in the dtype in which they were saved (DeepSpeed: fp32
            where there is a master).
        names: all names, in that order.
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
    deepspeed: DeepSpeedCheckpoint | None = None


def find(folder: Path, tag: str | None = None, *, trust: bool = False) -> Source:
    """The checkpoint in ``folder``, whichever engine saved it.

    Args:
        tag: of several DeepSpeed checkpoints in ``folder`` the one to read; default the one that ``latest`` names.
        trust: read pickles that name unknown classes (:mod:`tp_plugin.checkpoint.safe_pickle`).

    Raises:
        TPError: there is none, it is incomplete, damaged or not to be trusted; the message names the file.
    """
    if not folder.is_dir():
        raise TPError(f"{folder} is not a folder")
    atomic_dir.recover(folder)
    about = atomic_dir.check(folder)
    if tag is not None or has_tags(folder):
        return _deepspeed(DeepSpeedCheckpoint(find_tag(folder, tag), trust=trust))
    models = about.get("models") or [{}]
    more = {"config": models[0].get("config"), "aliases": models[0].get("aliases") or {}}
    if (folder / SHARDED / ".metadata").is_file():
        return _distributed(folder / SHARDED, trust, **more)
    for pattern in (FULL, "*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "pytorch_model.bin"):
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("adapter_"))
        if found:
            path = next((path for path in found if path.name.startswith("model.")), found[0])
            return _files(folder, path, trust, "FSDP2, full" if pattern == FULL else "whole weights", **more)
    if any(folder.glob("adapter_model.*")):
        raise TPError(f"{folder} holds an adapter, which PEFT loads as it is; there is no model in it")
    find_tag(folder, None)  # raises, and says what was looked for
    raise AssertionError


def _deepspeed(source: DeepSpeedCheckpoint) -> Source:
    names = list(source.model_state(0)["module"])
    kind = f"tp {source.tp}, dp {source.dp}"
    config = source.sidecar.get("config")
    return Source(source.folder, kind, source.full_masters, names, source.aliases, config, source)


def _files(folder: Path, path: Path, trust: bool, kind: str, **more: Any) -> Source:
    paths = _files_of_index(folder, path) if path.name.endswith(".index.json") else [path]
    for each in paths:
        if not each.is_file():
            raise TPError(f"checkpoint {folder} is not complete: {each.name} is missing")
    names = [name for each in paths for name in _readers(each, trust)]
    prefix = "module." if all(name.startswith("module.") for name in names) else ""  # what DDP puts before them

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for each in paths:
            for name, read in _readers(each, trust).items():
                yield name.removeprefix(prefix), read()

    return Source(folder, kind, tensors, [name.removeprefix(prefix) for name in names], **more)


def _files_of_index(folder: Path, index: Path) -> list[Path]:
    try:
        names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TPError(f"{index} is damaged: expected a JSON object with a weight_map ({error!r})") from error
    return [inside(folder, name, index) for name in names]


def _readers(path: Path, trust: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Readers of a file's tensors by name; tensors are not read before they are called."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # type: ignore[misc]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise TPError(f"checkpoint file {path} cannot be read ({error}); it is truncated or damaged") from error
    state = safe_pickle.load(path, trust=trust)
    if not isinstance(state, dict):
        raise TPError(f"{path} holds no weights by name, but a {type(state).__name__}")
    weights = [name for name, value in state.items() if isinstance(value, torch.Tensor)]
    return {name: lambda name=name: state[name] for name in weights}  # type: ignore[misc]


def _distributed(folder: Path, trust: bool, **more: Any) -> Source:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    origin = folder / ".metadata"
    metadata = safe_pickle.load_dcp_metadata(origin, trust=trust)
    for place in metadata.storage_data.values():
        inside(folder, place.relative_path, origin)
    entries = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    class Reader(FileSystemReader):
        """Uses the metadata that were read above, where torch's own would unpickle whatever the file says."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, entry in entries.items():
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
            try:
                load({key: tensor}, storage_reader=Reader(folder), no_dist=True)
            except (CheckpointException, *safe_pickle.DAMAGE) as error:
                raise TPError(f"{key!r} cannot be read from {folder} ({error}); a file is missing or damaged") from None
            yield key.removeprefix("model."), tensor

    # the state dict stands under the key "model", whose own names may begin so, too
    names = [key.removeprefix("model.") for key in entries]
    return Source(folder, "FSDP2, sharded", tensors, names, **more)
