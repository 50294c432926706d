"""save_state after each epoch; started with --resume, load_state and the second epoch only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--resume", default=None)
    args = parser.parse_args()

    project = ProjectConfiguration(project_dir=str(args.out), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(project_config=project)
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (15, 10), generator=generator)
    loader = torch.utils.data.DataLoader(ids, batch_size=2, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if args.resume:
        accelerator.load_state(args.resume)
    model.train()
    steps = []
    for _ in range(1 if args.resume else 2):
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loss = accelerator.gather(loss.detach()).mean().item()
            steps.append({"loss": loss, "norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
        if not args.resume:
            accelerator.save_state()
    if accelerator.is_main_process:
        (args.out / "report.json").write_text(json.dumps({"steps": steps}))


main()
