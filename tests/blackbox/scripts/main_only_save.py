"""Only the main process saves, and nobody else calls anything: in the middle of training, and at the very end."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, write_rank
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def save(accelerator, model, folder, how):
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        if how == "save_pretrained":
            unwrapped.save_pretrained(folder)
        elif how == "save_model":
            accelerator.save_model(model, folder)
        else:
            folder.mkdir(parents=True)
            torch.save(unwrapped.state_dict(), folder / "model.pt")


def main():
    parser = arguments()
    parser.add_argument("--how", choices=["save_pretrained", "save_model", "state_dict"], default="save_pretrained")
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(11)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    loader = DataLoader(
        Sentences(12, model.config.vocab_size, 3), batch_size=2, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, half = [], len(loader) // 2
    for number, batch in enumerate(loader):
        batch.pop("ids")
        if number == half:
            save(accelerator, model, args.out / "middle", args.how)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    write_rank(args.out, {"losses": losses})
    save(accelerator, model, args.out / "end", args.how)
    # the other processes have nothing left to do, and run off the end of the script


if __name__ == "__main__":
    main()
