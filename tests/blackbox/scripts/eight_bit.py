"""Trainer with optimizers that keep their states in 8 bits, and with the same in 32; resumed from a checkpoint."""

from __future__ import annotations

import json

import torch
from accelerate import PartialState
from common import arguments, logged
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

given = arguments().parse_args()
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_adamw_32bit", "lion_32bit")


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (9,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(optimizer: str) -> dict:
    out = given.out / optimizer

    def trainer() -> Trainer:
        settings = TrainingArguments(
            str(out), optim=optimizer, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, use_cpu=True,
            seed=3, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(
            AutoModelForCausalLM.from_pretrained(given.models / given.model), settings, train_dataset=rows(40)
        )

    first, second = trainer(), trainer()
    first.train()
    second.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    first.save_model(str(out / "final"))
    second.save_model(str(out / "again"))
    return {"log": logged(first), "again": logged(second)}


report = {optimizer: train(optimizer) for optimizer in OPTIMIZERS}
PartialState().wait_for_everyone()
if PartialState().is_main_process:
    (given.out / "report.json").write_text(json.dumps(report))
