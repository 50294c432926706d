"""The classic Accelerate loop: train with accumulation and clipping, evaluate, save."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, write, write_rank
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

EPOCHS, BATCH, ACCUMULATION, MAX_NORM = 2, 2, 2, 0.5


def parameter_groups(model):
    plain = ("bias", "norm", "ln_")
    decay = [p for n, p in model.named_parameters() if not any(word in n for word in plain)]
    rest = [p for n, p in model.named_parameters() if any(word in n for word in plain)]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def evaluate(accelerator, model, loader):
    model.eval()
    ids, losses, tokens = [], [], []
    for batch in loader:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        per_token = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        per_sample = per_token.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)
        best = logits[:, 3].argmax(-1)
        sample_ids, sample_losses, sample_tokens = accelerator.gather_for_metrics((batch["ids"], per_sample, best))
        ids += sample_ids.tolist()
        losses += sample_losses.tolist()
        tokens += sample_tokens.tolist()
    model.train()
    return {
        "ids": ids,
        "losses": losses,
        "tokens": tokens,
        "count": len(losses),
        "mean": sum(losses) / len(losses),
        "logits_width": logits.shape[-1],
        "batches": len(loader),
    }


def main():
    args = arguments().parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    vocab = model.config.vocab_size
    train_loader = DataLoader(Sentences(13, vocab, 1), batch_size=BATCH, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(Sentences(7, vocab, 2), batch_size=BATCH, collate_fn=collate)
    groups = parameter_groups(model)
    report = {
        "num_processes": accelerator.num_processes,
        "total_batch": BATCH * ACCUMULATION * accelerator.num_processes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "num_parameters": model.num_parameters(),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "embedding_rows": model.get_input_embeddings().weight.shape[0],
        "group_sizes": [sum(p.numel() for p in group["params"]) for group in groups],
        "batches_before_prepare": len(train_loader),
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    updates = EPOCHS * math.ceil(len(train_loader) / ACCUMULATION)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, updates)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    report |= {"batches": len(train_loader), "eval_batches": len(eval_loader)}
    report |= {"steps": [], "evaluations": [], "batches_seen": [], "updates": 0, "training_tokens": 0}
    own = {"process_index": accelerator.process_index, "is_main": accelerator.is_main_process}
    own["is_local_main"] = accelerator.is_local_main_process
    own |= {"losses": [], "norms": [], "ids": []}
    own["bytes"] = sum(p.untyped_storage().nbytes() for p in model.parameters())
    model.train()
    for _ in range(EPOCHS):
        seen = 0
        for batch in train_loader:
            ids = batch.pop("ids")
            step = {"last_of_epoch": accelerator.gradient_state.end_of_dataloader, "norm": None}
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                step["synced"] = accelerator.sync_gradients
                if accelerator.sync_gradients:
                    step["norm"] = float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM))
                    report["updates"] += 1
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen += 1
            tokens = accelerator.reduce((batch["labels"] != -100).sum(), reduction="sum").item()
            report["training_tokens"] += tokens
            step |= {
                "lr": scheduler.get_last_lr(),
                "losses": accelerator.gather(loss.detach()).reshape(-1).tolist(),
                "mean_loss": accelerator.reduce(loss.detach(), reduction="mean").item(),
                "ids": accelerator.gather_for_metrics(ids).tolist(),
                "batch_size": len(ids),
                "tokens": tokens,
            }
            report["steps"].append(step)
            own["losses"].append(loss.item())
            own["norms"].append(step["norm"])
            own["ids"].append(ids.tolist())
        report["batches_seen"].append(seen)
        report["evaluations"].append(evaluate(accelerator, model, eval_loader))

    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        args.out / "pretrained",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=state,
    )
    accelerator.save_model(model, args.out / "save_model")
    if not accelerator.is_fsdp2:  # which cannot save what it has not gathered
        unwrapped.save_pretrained(args.out / "pretrained_by_all", is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        report["state_dict"] = {name: [list(t.shape), str(t.dtype)] for name, t in state.items()}
        write(args.out / "report.json", report)
    write_rank(args.out, own)
    accelerator.end_training()


if __name__ == "__main__":
    main()
