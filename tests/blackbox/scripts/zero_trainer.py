"""HF Trainer with `--deepspeed ds.json`, arguments parsed as in transformers' examples; reports its log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from common import logged, metrics, samples, start_plain
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Script:
    out: Path = field()
    models: Path = field()
    model: str = "llama"
    resume: str | None = None


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
        report["log"] = logged(trainer)
        report["predicted"] = list(predicted.predictions.shape)
        report["kept"] = sorted(p.name for p in Path(settings.output_dir).iterdir())
        script.out.mkdir(exist_ok=True)
        (script.out / "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


main()
