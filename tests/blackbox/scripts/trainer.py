"""HF Trainer: evaluation, metrics, checkpoints and a limit on them, the best model at the end; reports its log."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import logged, metrics, samples
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    vocabulary = model.config.vocab_size
    settings = TrainingArguments(
        output_dir=str(args.out / "trainer"), use_cpu=True, seed=5, num_train_epochs=2, learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=1,
        eval_strategy="steps", eval_steps=4, save_steps=4, save_total_limit=2, load_best_model_at_end=True,
        include_num_input_tokens_seen=True, report_to=[], disable_tqdm=True,
        torch_compile=args.compile, torch_compile_backend="aot_eager" if args.compile else None,
    )  # fmt: skip
    trainer = Trainer(
        model,
        settings,
        train_dataset=samples(22, vocabulary, 0),
        eval_dataset=samples(7, vocabulary, 1),
        compute_metrics=metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    predicted = trainer.predict(samples(5, vocabulary, 2))
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # as examples do at the end
    trainer.save_model(str(args.out / "final"))
    if settings.world_size > 1:
        trainer.accelerator.wait_for_everyone()
    # a script of one process reads what it has just written, with no barrier between
    AutoModelForCausalLM.from_pretrained(args.out / "final")
    if trainer.is_world_process_zero():
        report = {"log": logged(trainer), "world": settings.world_size, "predicted": list(predicted.predictions.shape)}
        (args.out / "report.json").write_text(json.dumps(report))


main()
