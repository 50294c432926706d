"""What the scripts share: a data set, a collator, and where to write."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch.utils.data import Dataset


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of checkpoints")
    parser.add_argument("--model", default="llama", help="name of the checkpoint in that folder")
    return parser


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_rank(out: Path, content: object) -> None:
    write(out / f"rank{rank()}.json", content)


class Sentences(Dataset):
    """Random token sequences of different lengths, the same in every process."""

    def __init__(self, size: int, vocab_size: int, seed: int, shortest: int = 5, longest: int = 14):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (size,), generator=generator).tolist()
        self.rows = [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"id": index, "tokens": self.rows[index]}


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch; padding counts neither in attention nor in the loss."""
    longest = max(len(s["tokens"]) for s in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.long),
        "labels": torch.full((len(samples), longest), -100),
    }
    for row, sample in enumerate(samples):
        length = len(sample["tokens"])
        batch["input_ids"][row, :length] = sample["tokens"]
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = sample["tokens"]
    return batch | {"ids": torch.tensor([s["id"] for s in samples])}


def start_plain() -> None:
    """What plain DeepSpeed needs to run on CPU (BLACKBOX_PLAIN is set for the oracles only).

    Accelerate sees several processes only if gloo is named, for which a Trainer has no place; and DeepSpeed is kept
    from an op that compiles at start-up and leaves buffers in /dev/shm.
    """
    if not os.environ.get("BLACKBOX_PLAIN"):
        return
    import deepspeed
    from accelerate import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    original = PartialState.__init__
    if original.__name__ != "with_gloo":

        def with_gloo(self, *args, **kwargs):
            original(self, *args, **({"backend": "gloo"} | kwargs))

        PartialState.__init__ = with_gloo
