"""A QLoRA loop with Accelerate on any engine: accumulation, clipping, adapter and state saved, resumed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, start_plain, without_repacking, write
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.arange(6, 26).unsqueeze(0)


def main():
    start_plain()
    parser = arguments()
    parser.add_argument("--stateless", action="store_true", help="without load_state, which fails in plain Accelerate")
    parser.add_argument(
        "--storage",
        default="uint8",
        help="int8: 8 bits; else of 4-bit codes: FSDP2 splits those that are stored as floats",
    )
    parser.add_argument("--state", help="only evaluate what was saved here")
    given = parser.parse_args()
    codes = BitsAndBytesConfig(load_in_8bit=True) if given.storage == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=given.storage,
    )  # fmt: skip
    base = given.models / given.model
    accelerator = Accelerator(gradient_accumulation_steps=2)
    report = {"steps": []}

    def start():
        set_seed(7)
        model = without_repacking(AutoModelForCausalLM.from_pretrained(base, quantization_config=codes))
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
        loader = DataLoader(Sentences(16, model.config.vocab_size, 1), batch_size=2, shuffle=True, collate_fn=collate)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-6)
        return accelerator.prepare(model, optimizer, loader)

    def train(model, optimizer, loader):
        model.train()
        for batch in loader:
            batch.pop("ids")
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach().float(), reduction="mean").item()
            report["steps"].append([mean, norm if norm is None else float(norm)])

    def evaluate(model):
        model.eval()
        with torch.no_grad():
            return model(input_ids=IDS, labels=IDS).loss.item()

    model, optimizer, loader = start()
    if given.state:
        accelerator.load_state(given.state)
        report["loaded"] = evaluate(model)
        write(given.out / "report.json", report)
        return
    train(model, optimizer, loader)
    report["saved"] = evaluate(model)
    accelerator.save_state(str(given.out / "state"))
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        given.out / "adapter", is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    train(model, optimizer, loader)
    report["evaluated"] = evaluate(model)
    report["loaded"] = report["saved"]
    if not given.stateless:
        accelerator.free_memory()
        model, optimizer, loader = start()
        accelerator.load_state(str(given.out / "state"))
        report["loaded"] = evaluate(model)
    if accelerator.is_main_process:
        plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=codes)
        plain = without_repacking(PeftModel.from_pretrained(plain, given.out / "adapter")).eval()
        with torch.no_grad():
            report["reloaded"] = plain(input_ids=IDS, labels=IDS).loss.item()
        write(given.out / "report.json", report)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
