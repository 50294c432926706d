"""Several HF Trainers one after the other, each with other features of it; reports what each logged and computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from common import arguments, logged, unclocked
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

arguments_given = arguments().parse_args()
OUT, MODEL = arguments_given.out, arguments_given.models / arguments_given.model
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(MODEL)
CAUSAL = DataCollatorForSeq2Seq(TOKENIZER, padding=True)
SETTINGS = {
    "use_cpu": True, "seed": 5, "max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1,
}  # fmt: skip


def sentences(count: int, seed: int, vocabulary: int = 121) -> Dataset:
    """As examples do it: the main process maps, the others find its cache."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(6, vocabulary, (n,), generator=generator).tolist() for n in
            torch.randint(4, 15, (count,), generator=generator).tolist()]  # fmt: skip
    data = Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows], "kind": [sum(r) % 3 for r in rows]})
    with PartialState().main_process_first():
        ids = data.map(lambda row: {"input_ids": [int(word) for word in row["text"].split()]}, remove_columns=["text"])
    return ids.map(lambda row: {"labels": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])})


TRAIN, EVAL, TEST = sentences(37, 0), sentences(11, 1), sentences(5, 2)


def language_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL)


def trainer(name: str, model=None, cls=Trainer, args=TrainingArguments, **given) -> Trainer:
    own = {key: given.pop(key) for key in list(given) if key in args.__dataclass_fields__}
    settings = args(**{**SETTINGS, "output_dir": str(OUT / name), **own})
    given = {"data_collator": CAUSAL, "train_dataset": TRAIN, "eval_dataset": EVAL, **given}
    return cls(language_model() if model is None else model, settings, **given)


def log_of(one: Trainer) -> dict:
    return {"log": logged(one), "flos": one.state.total_flos, "step": one.state.global_step,
            "tokens": int(one.state.num_input_tokens_seen)}  # fmt: skip


def hits(prediction) -> dict[str, float]:
    guesses, labels = prediction.predictions, prediction.label_ids
    right = (guesses[:, :-1] == labels[:, 1:]) & (labels[:, 1:] != -100)
    return {"accuracy": float(right.sum() / (labels[:, 1:] != -100).sum()), "seen": len(guesses)}


def averaged() -> dict:
    """Tokens counted across devices and padding; smoothing; batches by length; the steps of an example script."""
    one = trainer("averaged", average_tokens_across_devices=True, label_smoothing_factor=0.1,
                  include_num_input_tokens_seen="non_padding", train_sampling_strategy="group_by_length",
                  eval_strategy="steps", eval_steps=3)  # fmt: skip
    result = one.train()
    metrics = unclocked(result.metrics)
    seconds = result.metrics["train_runtime"]
    # what the clock cannot change: samples and steps by its own seconds
    samples = round(result.metrics["train_samples_per_second"] * seconds)
    one.log_metrics("train", result.metrics)
    one.save_metrics("train", result.metrics)
    one.save_state()
    evaluated = one.evaluate()
    evaluated["perplexity"] = math.exp(evaluated["eval_loss"])
    one.log_metrics("eval", evaluated)
    one.save_metrics("eval", evaluated)
    written = sorted(path.name for path in (OUT / "averaged").iterdir())
    return log_of(one) | {"metrics": metrics, "samples": abs(samples - 24 * one.args.world_size) <= 1,
                          "perplexity": evaluated["perplexity"], "written": written}  # fmt: skip


def unaveraged() -> dict:
    """Each device averages its own tokens; metrics of preprocessed logits; a ragged last batch; prediction."""
    one = trainer("unaveraged", average_tokens_across_devices=False, include_num_input_tokens_seen="all",
                  per_device_eval_batch_size=2, compute_metrics=hits, optim="adamw_torch_fused",
                  preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
                  callbacks=[EarlyStoppingCallback(3)], eval_strategy="steps", eval_steps=2, save_strategy="steps",
                  save_steps=2, save_total_limit=2, load_best_model_at_end=True,
                  metric_for_best_model="eval_loss")  # fmt: skip
    one.train()
    kept = sorted(path.name for path in (OUT / "unaveraged").iterdir())
    predicted = one.predict(TEST)
    best = one.state.best_model_checkpoint
    return log_of(one) | {"kept": kept, "best": Path(best).name, "hits": predicted.predictions.tolist(),
                          "metrics": {k: v for k, v in predicted.metrics.items() if "per_second" not in k and
                                      "runtime" not in k}}  # fmt: skip


def whole_metrics() -> dict:
    """Metrics of whole logits, batch by batch, with padded predictions; another optimizer."""
    kept = []

    def count(prediction, compute_result: bool = False) -> dict:
        right = torch.as_tensor(prediction.predictions).argmax(-1) == torch.as_tensor(prediction.label_ids)
        kept.append(right.float().mean().item())
        return {"accuracy": float(np.mean(kept))} if compute_result else {}

    one = trainer("whole_metrics", compute_metrics=count, batch_eval_metrics=True, optim="adafactor", max_steps=4,
                  max_grad_norm=1.0)  # fmt: skip
    one.train()
    predicted = one.predict(TEST).metrics["test_loss"]
    one.compute_metrics = None
    logits = one.predict(TEST).predictions
    return log_of(one) | {"predicted": predicted, "logits": float(np.abs(logits).mean()), "shape": list(logits.shape)}


class Hungry(Trainer):
    """Cannot take more than two samples at once."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def fitting() -> dict:
    """A batch size found by failing; resized embeddings."""
    set_seed(1)
    model = language_model()
    model.resize_token_embeddings(140)
    one = trainer("fitting", model, Hungry, auto_find_batch_size=True, per_device_train_batch_size=5, max_steps=3,
                  gradient_accumulation_steps=1)  # fmt: skip
    one.train()
    return log_of(one) | {"batch": one._train_batch_size, "saved": list(one.model.state_dict()["lm_head.weight"].shape)}


def resumed(name: str = "through", adapted: bool = False) -> dict:
    """Stopped in the middle of an epoch and gone on with, and at another time through."""

    def start(folder: str, seed: int, **given) -> Trainer:
        set_seed(seed)
        model = language_model()
        if adapted:
            lora = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], r=4)
            model = get_peft_model(model, lora)
        return trainer(folder, model, max_steps=6, **given)

    through = start(name, 5, save_strategy="steps", save_steps=2, num_train_epochs=1)
    through.train()
    again = start(f"{name}_again", 6)
    again.accelerator.wait_for_everyone()
    again.train(resume_from_checkpoint=str(OUT / name / "checkpoint-2"))
    losses = [[entry["loss"], entry["grad_norm"]] for entry in again.state.log_history if "loss" in entry]
    expected = [[entry["loss"], entry["grad_norm"]] for entry in through.state.log_history if "loss" in entry]
    return {"exact": losses == expected, "off": float(np.abs(np.array(losses) - np.array(expected)).max()),
            **log_of(again)}  # fmt: skip


def resumed_adapter() -> dict:
    """An adapter on every linear but the head, which is trained whole."""
    return resumed("adapter", adapted=True)


def classified() -> dict:
    """A classifier; labels by column; padding by the tokenizer."""
    set_seed(2)
    config = BertConfig(vocab_size=131, hidden_size=48, intermediate_size=90, num_hidden_layers=2, num_labels=3,
                        num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    train, evaluation = (d.remove_columns("labels").rename_column("kind", "label") for d in (TRAIN, EVAL))

    def accuracy(prediction) -> dict:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    one = trainer("classified", model, train_dataset=train, eval_dataset=evaluation, compute_metrics=accuracy,
                  data_collator=DataCollatorWithPadding(TOKENIZER), eval_strategy="epoch")  # fmt: skip
    one.train()
    return log_of(one)


def generated() -> dict:
    """Sequence to sequence, evaluated by what it generates."""
    set_seed(3)
    config = T5Config(vocab_size=131, d_model=48, d_kv=4, d_ff=80, num_layers=2, num_heads=4, dropout_rate=0.0,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)

    def compare(prediction) -> dict:
        return {"tokens": int(np.where(prediction.predictions < 0, 0, prediction.predictions).sum())}

    one = trainer("generated", model, Seq2SeqTrainer, Seq2SeqTrainingArguments, predict_with_generate=True,
                  generation_config=GenerationConfig(max_new_tokens=6, num_beams=2, decoder_start_token_id=0,
                                                     eos_token_id=2, pad_token_id=0),
                  compute_metrics=compare, eval_strategy="steps", eval_steps=3,
                  data_collator=DataCollatorForSeq2Seq(TOKENIZER, model))  # fmt: skip
    one.train()
    predicted = one.predict(TEST, max_new_tokens=5, num_beams=1)
    return log_of(one) | {"predicted": predicted.predictions.tolist()}


def half() -> dict:
    """bf16 autocast; reported apart, as two runs in bf16 differ in their last digits."""
    one = trainer("half", bf16=True, max_steps=4)
    one.train()
    return {"losses": [entry["loss"] for entry in one.state.log_history if "loss" in entry]}


CASES = (averaged, unaveraged, whole_metrics, fitting, resumed, resumed_adapter, classified, generated, half)
report = {}
for case in CASES:
    try:
        report[case.__name__] = case()
    except Exception as error:
        import traceback

        traceback.print_exc()
        report[case.__name__] = f"{type(error).__name__}: {error}"
PartialState().wait_for_everyone()
if PartialState().is_main_process:
    (OUT / "report.json").write_text(json.dumps(report))
