"""``tp-plugin export``: a checkpoint of any engine, tp and dp → a model for plain transformers. One process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tp_plugin.checkpoint import sources
from tp_plugin.checkpoint.folders import complete_or_absent
from tp_plugin.checkpoint.safe_paths import copy_inside
from tp_plugin.errors import TPError

BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
"""Files that Trainer leaves beside the weights and that belong in a model folder."""


def export(folder: Path, output: Path, tag: str | None, dtype: str, shard_size: int, *, trust: bool = False) -> None:
    """Write ``output`` with safetensors files of at most ``shard_size`` bytes, tensor by tensor, and the config.

    Args:
        tag: of several DeepSpeed checkpoints in ``folder`` the one to read; default the one that ``latest`` names.
        dtype: the torch dtype, by its name, of all floating-point tensors in ``output``.
        trust: read pickles that name unknown classes.

    Raises:
        TPError: no checkpoint, an incomplete, damaged or untrusted one, or ``output`` exists.
    """
    source = sources.find(folder, tag, trust=trust)
    if any(name.startswith("base_model.model.") for name in source.names):
        raise TPError(
            f"{source.folder} is a checkpoint of a PEFT model, which is no plain model; resume from it and call "
            "save_pretrained, which writes the adapter"
        )
    with complete_or_absent(output) as out:
        for pattern in BESIDE:
            for path in sorted(folder.glob(pattern)):
                copy_inside(folder, path, out / path.name)
        known = (out / "config.json").exists()
        if source.config is not None and not known:
            config = {**source.config, "dtype": dtype}
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        count = _write(_tensors(source, getattr(torch, dtype)), out, shard_size)
    print(f"{count} tensors from {source.folder} ({source.kind}) written to {output}", file=sys.stderr)
    if source.config is None and not known:
        print(f"{source.folder} does not say of which model; put its config.json beside them", file=sys.stderr)


def _tensors(source: sources.Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in source.tensors():
        if name not in source.aliases:
            yield name, (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _write(tensors: Iterator[tuple[str, torch.Tensor]], out: Path, limit: int) -> int:
    shards: list[list[str]] = []
    total = 0
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(held, out / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + size > limit:
            flush()
        held[name] = tensor.clone()
        total += size
    flush()
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, names in enumerate(shards):
        several = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        (out / f"{number}.part").rename(out / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(len(names) for names in shards)
