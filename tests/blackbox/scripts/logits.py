"""Scripts that read logits: on the main process alone while training and evaluating, in own losses, in a Trainer."""

from __future__ import annotations

import traceback

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, write_rank
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def prepared(args):
    accelerator = Accelerator()
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    data = Sentences(16, model.config.vocab_size, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(data, batch_size=2, collate_fn=collate, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def main_process_reads(args):
    """Before the backward, after it, after the step, in evaluation; nobody else touches the logits."""
    accelerator, model, optimizer, loader = prepared(args)
    seen, losses = [], []

    def look(outputs, **more):
        if accelerator.is_main_process:
            logits = outputs.logits
            print(logits[0, -1, :3], flush=True)
            seen.append([logits.mean().item(), logits[0].argmax(-1).tolist(), logits.softmax(-1).amax().item()])

    for number, batch in enumerate(loader):
        batch.pop("ids")
        outputs = model(**batch)
        if number % 3 == 0:
            look(outputs)
        accelerator.backward(outputs.loss)
        if number % 3 == 1:
            look(outputs)
        optimizer.step()
        if number % 3 == 2:
            look(outputs)
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    model.eval()
    for batch in loader:
        batch.pop("ids")
        with torch.no_grad():
            outputs = model(**batch)
        look(outputs)
        losses.append(accelerator.gather_for_metrics(outputs.loss.repeat(2)).mean().item())
    return {"seen": seen, "losses": losses}


def distilled(args):
    """A loss of log-probabilities beside the model's, accuracy from argmax, gathered over the processes."""
    accelerator, model, optimizer, loader = prepared(args)
    found = []
    for batch in loader:
        batch.pop("ids")
        outputs = model(**batch)
        log = nn.functional.log_softmax(outputs.logits.float() / 2, -1)
        wanted = torch.softmax(outputs.logits.detach().roll(1, dims=1), -1)
        loss = outputs.loss + nn.functional.kl_div(log, wanted, reduction="batchmean")
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        hits = accelerator.gather_for_metrics((outputs.logits.argmax(-1) == batch["labels"]).float().mean(1))
        width = accelerator.gather_for_metrics(accelerator.pad_across_processes(outputs.logits, dim=1)).shape
        found.append([loss.item(), norm.item(), hits.mean().item(), *width])
    return {"losses": found}


def trainer(args):
    """Label smoothing, metrics of the whole logits and of what preprocess_logits_for_metrics leaves, both."""
    found = {}
    for name in ("whole", "preprocessed"):
        model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (12, 9), generator=generator)
        rows = [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]
        settings = TrainingArguments(
            output_dir=str(args.out / "trainer"), use_cpu=True, seed=5, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=2, max_grad_norm=0.5, logging_steps=1, label_smoothing_factor=0.1,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip

        def metrics(prediction, name=name):
            predictions = prediction.predictions
            picked = predictions.argmax(-1) if name == "whole" else predictions
            return {"accuracy": float((picked[:, :-1] == prediction.label_ids[:, 1:]).mean()), "sum": int(picked.sum())}

        best = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)} if name != "whole" else {}
        trained = Trainer(model, settings, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics, **best)
        trained.train()
        evaluated = trained.evaluate()
        found[name] = [evaluated["eval_loss"], evaluated["eval_accuracy"], evaluated["eval_sum"]]
        found[name] += [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return found


def main():
    args = arguments().parse_args()
    report = {}
    for part in (main_process_reads, distilled, trainer):
        try:
            report[part.__name__] = part(args)
        except Exception:
            report[part.__name__] = {"failed": traceback.format_exc()}
    write_rank(args.out, report)


if __name__ == "__main__":
    main()
