"""Accelerate and DeepSpeed: accumulation, clipping by the config, evaluation, saving of weights and of the state."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim, DummyScheduler, set_seed
from common import Sentences, arguments, collate, held_elements, start_plain, write, write_rank
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

EPOCHS, BATCH, ACCUMULATION, MAX_NORM = 2, 2, 2, 0.5


def parser():
    parser = arguments()
    parser.add_argument("--plugin", help="DeepSpeed config that the script itself gives to Accelerator")
    parser.add_argument("--save", choices=["weights", "state", "nothing"], default="weights")
    parser.add_argument("--resume", help="state to start from, after the first epoch")
    return parser


def evaluate(accelerator, model, loader):
    model.eval()
    ids, losses, tokens = [], [], []
    for batch in loader:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        per_token = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        per_sample = per_token.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)
        found = accelerator.gather_for_metrics((batch["ids"], per_sample, logits[:, 3].argmax(-1)))
        for kept, values in zip((ids, losses, tokens), found, strict=True):
            kept += values.tolist()
    model.train()
    return {"ids": ids, "losses": losses, "tokens": tokens, "mean": sum(losses) / len(losses), "batches": len(loader)}


def main():
    start_plain()
    args = parser().parse_args()
    plugin = DeepSpeedPlugin(hf_ds_config=args.plugin) if args.plugin else None
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=plugin)
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    vocab = model.config.vocab_size
    train_loader = DataLoader(Sentences(13, vocab, 1), batch_size=BATCH, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(Sentences(7, vocab, 2), batch_size=BATCH, collate_fn=collate)
    config = accelerator.deepspeed_plugin.deepspeed_config
    updates = EPOCHS * math.ceil(len(train_loader) / ACCUMULATION)
    if "optimizer" in config:
        optimizer = DummyOptim(model.parameters(), lr=1e-3, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6)
    if "scheduler" in config:
        scheduler = DummyScheduler(optimizer, total_num_steps=updates, warmup_num_steps=2)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, 1, updates)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    if args.resume:
        accelerator.load_state(args.resume)
    state = accelerator.state
    report = {
        "num_processes": accelerator.num_processes,
        "distributed_type": str(state.distributed_type),
        "mixed_precision": accelerator.mixed_precision,
        "batches": len(train_loader),
        "eval_batches": len(eval_loader),
        "config": accelerator.deepspeed_config,
        "train_batch_size": model.train_batch_size(),
        "micro_batch_size": model.train_micro_batch_size_per_gpu(),
        "accumulation": model.gradient_accumulation_steps(),
        "dp_world_size": model.dp_world_size,
        "stage": model.zero_optimization_stage(),
        "steps": [],
        "evaluations": [],
    }
    own = {"process_index": accelerator.process_index, "is_main": accelerator.is_main_process}
    own |= {"losses": [], "norms": [], "ids": []}
    own["elements"] = held_elements(model)
    model.train()
    for _ in range(1 if args.resume else EPOCHS):
        for batch in train_loader:
            ids = batch.pop("ids")
            step = {"norm": None}
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                step["synced"] = accelerator.sync_gradients
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    step["norm"] = None if norm is None else float(norm)  # DeepSpeed has none in fp32 without ZeRO
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step |= {
                "lr": optimizer.param_groups[0]["lr"],
                "losses": accelerator.gather(loss.detach().float()).reshape(-1).tolist(),
                "mean_loss": accelerator.reduce(loss.detach().float(), reduction="mean").item(),
                "ids": accelerator.gather_for_metrics(ids).tolist(),
                "tokens": accelerator.reduce((batch["labels"] != -100).sum(), reduction="sum").item(),
                "skipped": accelerator.optimizer_step_was_skipped,
            }
            report["steps"].append(step)
            own["losses"].append(loss.item())
            own["norms"].append(step["norm"])
            own["ids"].append(ids.tolist())
        report["evaluations"].append(evaluate(accelerator, model, eval_loader))
        if args.save == "state" and len(report["evaluations"]) == 1 and not args.resume:
            accelerator.save_state(str(args.out / "state"))
    report |= {"global_steps": model.global_steps, "global_samples": model.global_samples}

    accelerator.wait_for_everyone()
    if args.save == "weights":
        weights = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            args.out / "pretrained",
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=weights,
        )
        accelerator.save_model(model, args.out / "save_model")
        if accelerator.is_main_process:
            report["state_dict"] = {name: [list(t.shape), str(t.dtype)] for name, t in weights.items()}
    if accelerator.is_main_process:
        write(args.out / "report.json", report)
    write_rank(args.out, own)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
