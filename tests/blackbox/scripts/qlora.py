"""QLoRA by TRL's command line arguments, by Trainer, and on a base that is quantized in its files."""

from __future__ import annotations

import importlib
import json

import torch
from accelerate import Accelerator, PartialState
from common import arguments, logged, without_repacking
from datasets import load_dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOTrainer, SFTTrainer, get_peft_config, get_quantization_config

from tp_plugin.errors import TPError

parser = arguments()
parser.add_argument("--dropout", default="0.05", help="TRL's default")
given = parser.parse_args()
MODEL = given.models / given.model
IDS = torch.arange(6, 26).unsqueeze(0)
COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
    "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "seed": 3, "disable_tqdm": True, "adam_epsilon": 1e-6,
}  # fmt: skip
WORDS = (
    "--dtype float32 --load_in_4bit true --use_bnb_nested_quant true --use_peft --lora_r 4 --lora_alpha 8 "
    f"--lora_dropout {given.dropout} --lora_target_modules all-linear --report_to none --gradient_checkpointing true "
    "--save_strategy no " + " ".join(f"--{key} {value}" for key, value in COMMON.items())
)


def reloaded(folder, base):
    """By plain PEFT, in the process that saved it."""
    model = without_repacking(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)).eval()
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.item()


def tuned(method, kind, data, *more):
    """One of TRL's trainers with the arguments of its command line."""
    parser = importlib.import_module(f"trl.scripts.{method}").make_parser()
    data, out = given.models / data, given.out / method
    words = [*WORDS.split(), *more, "--model_name_or_path", str(MODEL), "--output_dir", str(out)]
    _, settings, model, _ = parser.parse_args_and_config([*words, "--dataset_name", str(data)])
    settings.model_init_kwargs = {"dtype": model.dtype}
    splits = load_dataset(str(data), cache_dir=str(given.out / "cache"))
    quantization, adapters = get_quantization_config(model), get_peft_config(model)
    trainer = kind(
        str(MODEL),
        args=settings,
        train_dataset=splits["train"],
        quantization_config=quantization,
        peft_config=adapters,
    )
    without_repacking(trainer.model)
    trainer.train()
    trainer.save_model(str(out / "final"))
    return {"log": logged(trainer), "reloaded": reloaded(out / "final", MODEL)}


def resumed(name, rank, optimizer):
    """A base whose files have codes, trained by Trainer; then from its checkpoint of the second step."""
    out, data = given.out / name, [{"input_ids": list(range(n, n + 9)), "labels": list(range(n, n + 9))}
                                   for n in range(6, 30)]  # fmt: skip

    def trainer():
        model = without_repacking(AutoModelForCausalLM.from_pretrained(given.models / "codes"))
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=rank))
        settings = TrainingArguments(
            str(out), **COMMON, optim=optimizer, save_strategy="steps", save_steps=2, report_to="none"
        )
        return Trainer(model, settings, train_dataset=data)

    first, second = trainer(), trainer()
    first.train()
    second.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    first.save_model(str(out / "final"))
    found = {"log": logged(first), "again": logged(second), "reloaded": reloaded(out / "final", given.models / "codes")}
    found["parameters"] = sum(p.numel() for p in Accelerator().unwrap_model(first.model).parameters())
    return found


def saved():
    """A base that is prepared and saved as it is; loaded by plain transformers."""
    out = given.out / "saved"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=settings)
    model = Accelerator().prepare(without_repacking(base))
    model.save_pretrained(out)
    PartialState().wait_for_everyone()
    again = without_repacking(AutoModelForCausalLM.from_pretrained(out)).eval()
    with torch.no_grad():
        losses = [one(input_ids=IDS, labels=IDS).loss.item() for one in (model.eval(), again)]
        return {"losses": losses, "generated": model.generate(IDS, max_new_tokens=6, do_sample=False).tolist()}


def prefixed():
    """A prefix in front of a quantized base; refused with stages."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = without_repacking(AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=settings))
    torch.manual_seed(2)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    accelerator, seen = Accelerator(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    try:
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            seen.append([loss.item(), float(norm)])
    except TPError as error:
        return str(error)
    return seen


def merged():
    """An adapter that is merged into the codes, saved with them, and loaded by plain transformers."""
    out = given.out / "merged"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = without_repacking(AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=settings))
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    accelerator = Accelerator()
    model = accelerator.unwrap_model(accelerator.prepare(model)).merge_and_unload()
    model.save_pretrained(out)
    accelerator.wait_for_everyone()
    again = without_repacking(AutoModelForCausalLM.from_pretrained(out)).eval()
    with torch.no_grad():
        return [one(input_ids=IDS, labels=IDS).loss.item() for one in (model.eval(), again)]


report = {
    "sft": tuned("sft", SFTTrainer, "completion", "--completion_only_loss", "true"),
    "dpo": tuned("dpo", DPOTrainer, "preference"),
    "resumed": resumed("resumed", 4, "adamw_torch_fused"),
    "eight bits": resumed("eight", 32, "paged_adamw_8bit"),  # of matrices with 4096 elements and more
    "saved": saved(),
    "merged": merged(),
    "prefixed": prefixed(),
}
PartialState().wait_for_everyone()
if PartialState().is_main_process:
    (given.out / "report.json").write_text(json.dumps(report))
