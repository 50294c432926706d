"""Fine-tune a causal language model on a text file with Accelerate.

    accelerate launch --config_file examples/configs/single.yaml examples/finetune.py \
        --model out/checkpoint --data out/corpus.txt --output out/finetuned
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_scheduler


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data", type=Path, required=True, help="text file; its end is kept for evaluation")
    parser.add_argument("--output", type=Path, required=True, help="folder for the fine-tuned checkpoint")
    parser.add_argument("--log-file", type=Path, help="one JSON line per optimizer step and per evaluation")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, help="optimizer steps; overrides --epochs")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per process and micro-batch")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens per training example")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-ratio", type=float, default=0.1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--eval-fraction", type=float, default=0.05)
    parser.add_argument("--eval-every", type=int, default=0, help="optimizer steps; 0: only at the end")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class TextBlocks(Dataset):
    """Consecutive blocks of equal length; what is left over at the end is dropped."""

    def __init__(self, token_ids: list[int], block_size: int):
        count = len(token_ids) // block_size
        self.blocks = torch.tensor(token_ids[: count * block_size]).view(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def load_data(args: argparse.Namespace, tokenizer) -> tuple[TextBlocks, TextBlocks]:
    text = args.data.read_text(encoding="utf-8")
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = int(len(token_ids) * (1 - args.eval_fraction))
    return TextBlocks(token_ids[:cut], args.block_size), TextBlocks(token_ids[cut:], args.block_size)


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Weight decay for matrices only: biases and norms are left alone.

    They are told apart by name, which holds also where a parameter is not there in full (ZeRO-3).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_matrix = {name: not re.search(r"bias|norm|\bln_", name) for name, _ in named}
    groups = [
        {"params": [p for name, p in named if is_matrix[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not is_matrix[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> tuple[float, int]:
    """Mean loss over the evaluation set and how many blocks it has."""
    model.eval()
    losses = []
    for batch in loader:
        logits, labels = model(**batch).logits, batch["labels"]
        # One loss per block: gather_for_metrics drops the blocks that only filled up the last batch.
        tokens = cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        losses.append(accelerator.gather_for_metrics(tokens.mean(dim=1)))
    model.train()
    losses = torch.cat(losses)
    return losses.mean().item(), len(losses)


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.accum)
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    train_data, eval_data = load_data(args, tokenizer)
    train_loader = DataLoader(
        train_data,
        batch_size=args.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),  # one order, whatever the number of processes
        drop_last=True,
        collate_fn=default_data_collator,
    )
    eval_loader = DataLoader(eval_data, batch_size=args.batch_size, collate_fn=default_data_collator)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)

    # `prepare` divides the loader among the processes, and the prepared scheduler takes one step per process at each
    # optimizer step; hence the factors below. All are prepared in one call, as DeepSpeed needs it.
    processes = accelerator.num_processes
    total_steps = args.max_steps or args.epochs * math.ceil(len(train_loader) // processes / args.accum)
    scheduler = get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=int(args.warmup_ratio * total_steps) * processes,
        num_training_steps=total_steps * processes,
    )
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    accelerator.print(
        f"{len(train_data)} training blocks of {args.block_size} tokens, {len(eval_data)} for evaluation; "
        f"{total_steps} steps of {args.batch_size * args.accum * processes} blocks on {processes} process(es)"
    )

    log_file = None
    if args.log_file and accelerator.is_main_process:
        args.log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file = args.log_file.open("w", encoding="utf-8")

    def log(**record) -> None:
        if log_file:
            print(json.dumps(record), file=log_file, flush=True)

    def log_evaluation(step: int) -> None:
        loss, blocks = evaluate(accelerator, model, eval_loader)
        log(step=step, eval_loss=loss, eval_blocks=blocks)
        if accelerator.is_main_process:  # above the progress bar, not through it
            tqdm.write(f"step {step}: evaluation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {blocks} blocks")

    progress = tqdm(total=total_steps, desc="training", unit="step", disable=not accelerator.is_local_main_process)
    step = 0
    log_evaluation(step)
    while step < total_steps:
        losses = []
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.detach().float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            step += 1
            # Blocks have equal length, so the mean over micro-batches and processes is the mean over tokens.
            loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            losses = []
            log(step=step, loss=loss, lr=lr, grad_norm=float(grad_norm))
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
            if step == total_steps or (args.eval_every and step % args.eval_every == 0):
                log_evaluation(step)
            if step == total_steps:
                break
    progress.close()

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output)
        accelerator.print(f"saved to {args.output}")
    if log_file:
        log_file.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
