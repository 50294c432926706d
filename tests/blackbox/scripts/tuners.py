"""TRL's SFT and DPO trainers with the arguments of its command line, one after the other; reports what each logged."""

from __future__ import annotations

import importlib
import json
import traceback

import torch
from accelerate import PartialState
from common import arguments, logged
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, SFTTrainer, get_peft_config

given = arguments().parse_args()
MODEL = given.models / given.model
COMMON = (
    "--dtype float32 --max_steps 4 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --logging_steps 1 "
    "--learning_rate 1e-3 --report_to none --use_cpu true --bf16 false --gradient_checkpointing false --seed 3 "
    "--disable_tqdm true --save_strategy no --adam_epsilon 1e-6"
)
LORA = "--use_peft --lora_r 4 --lora_alpha 8 --lora_dropout 0.0"
EVAL = "--eval_strategy steps --eval_steps 2 --per_device_eval_batch_size 2"
CASES = {
    "sft": f"sft chat --assistant_only_loss true {EVAL}",
    "sft_packed": "sft chat --packing true --packing_strategy wrapped --max_length 24 --gradient_checkpointing true",
    "sft_lora": f"sft completion --completion_only_loss true --lora_target_modules all-linear {LORA} {EVAL}",
    "dpo": f"dpo preference --beta 0.2 {EVAL}",
    "dpo_before": "dpo preference --precompute_ref_log_probs true",
    "dpo_lora": f"dpo preference --lora_target_modules q_proj o_proj up_proj down_proj {LORA} {EVAL}",
    # a loss that balances the experts, which TRL asks for
    "sft_mixture": f"sft chat --router_aux_loss_coef 0.1 {EVAL}",
    "dpo_mixture": "dpo preference --beta 0.2 --router_aux_loss_coef 0.1",
}


def run(name: str, words: str) -> dict:
    method, data, *options = words.split()
    parser = importlib.import_module(f"trl.scripts.{method}").make_parser()
    out = given.out / name
    start = given.models / "mixture" if "mixture" in name else MODEL
    words = [*COMMON.split(), *options, "--model_name_or_path", str(start), "--output_dir", str(out)]
    _, settings, model, _ = parser.parse_args_and_config([*words, "--dataset_name", str(given.models / data)])
    settings.model_init_kwargs = {"dtype": model.dtype}
    splits = load_dataset(str(given.models / data), cache_dir=str(given.out / "cache"))
    trainer = {"sft": SFTTrainer, "dpo": DPOTrainer}[method](
        model.model_name_or_path,
        args=settings,
        train_dataset=splits["train"],
        eval_dataset=splits["test"] if settings.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(str(out / "final"))
    found = {"log": logged(trainer)}
    if "lora" in name:  # by plain PEFT and transformers, in the process that saved it
        reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), out / "final")
        ids = torch.arange(6, 26).unsqueeze(0)
        with torch.no_grad():
            found["reloaded"] = reloaded.eval()(input_ids=ids, labels=ids).loss.item()
    return found


report = {}
for name, words in CASES.items():
    try:
        report[name] = run(name, words)
    except Exception as error:
        traceback.print_exc()
        report[name] = f"{type(error).__name__}: {error}"
PartialState().wait_for_everyone()
if PartialState().is_main_process:
    (given.out / "report.json").write_text(json.dumps(report))
