"""HF Trainer with `--deepspeed ds.json`, arguments parsed as in transformers' examples; reports its log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import start_plain
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

UNLIKE = ("runtime", "per_second")  # what a clock says


@dataclass
class Script:
    out: Path = field()
    models: Path = field()
    model: str = "llama"
    resume: str | None = None


def samples(count: int, vocabulary: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def metrics(prediction) -> dict[str, float]:
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean()), "seen": len(prediction.predictions)}


def main() -> None:
    start_plain()
    script, settings = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(script.models / script.model)
    vocabulary = model.config.vocab_size
    trainer = Trainer(
        model,
        settings,
        train_dataset=samples(22, vocabulary, 0),
        eval_dataset=samples(7, vocabulary, 1),
        compute_metrics=metrics,
    )
    trainer.train(resume_from_checkpoint=script.resume)
    engine = trainer.deepspeed
    report = {
        "world": settings.world_size,
        "train_batch_size": engine.train_batch_size(),
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "global_steps": engine.global_steps,
        "config": engine.config,
    }
    trainer.save_model(str(script.out / "final"))
    predicted = trainer.predict(samples(5, vocabulary, 2))
    if trainer.is_world_process_zero():
        report["log"] = [
            {k: v for k, v in entry.items() if not any(w in k for w in UNLIKE)} for entry in trainer.state.log_history
        ]
        report["predicted"] = list(predicted.predictions.shape)
        report["kept"] = sorted(p.name for p in Path(settings.output_dir).iterdir())
        script.out.mkdir(exist_ok=True)
        (script.out / "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


main()
