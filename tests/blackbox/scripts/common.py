"""What the scripts share: a data set, a collator, and where to write."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
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


def held_elements(model):
    """What this rank has in memory; parameters look whole to a script."""
    if hasattr(next(model.parameters()), "ds_numel"):
        return sum(p.ds_numel for p in model.parameters())
    memory = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // p.element_size() for p in model.parameters()
    }
    return sum(memory.values())


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


def samples(count: int, vocabulary: int, seed: int) -> list[dict]:
    """Random sequences of one length with labels, for a Trainer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def metrics(prediction) -> dict[str, float]:
    """Token accuracy and the number of samples, for a Trainer."""
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean()), "seen": len(prediction.predictions)}


def unclocked(entry: dict) -> dict:
    """An entry of a trainer's log without what a clock says."""
    return {k: v for k, v in entry.items() if not any(word in k for word in ("runtime", "per_second", "_time"))}


def logged(trainer) -> list[dict]:
    """What a trainer logged, so far as two runs may have it in common."""
    return [unclocked(entry) for entry in trainer.state.log_history]


def save_whole(accelerator, model, folder: Path, name: str) -> None:
    """Write the weights as the script gets them."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, folder / f"{name}.safetensors")


def without_repacking(model):
    """The CPU's own layout of codes, which rounds their scales, is one process's alone."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


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
