"""A script that calls deepspeed.initialize itself: optimizer, scheduler and loader are DeepSpeed's."""

from __future__ import annotations

import json
import os

import deepspeed
import torch
from common import Sentences, arguments, collate, held_elements, start_plain, write, write_rank
from deepspeed import comm
from transformers import AutoModelForCausalLM

EPOCHS = 2


def main():
    parser = arguments()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--code", help="config that this script holds as a dict")
    parser.add_argument("--early", action="store_true", help="the script starts torch.distributed itself")
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    start_plain()
    if args.early:
        deepspeed.init_distributed()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    data = Sentences(13, model.config.vocab_size, 1)
    named = {"args": args}
    if args.code:
        args.deepspeed_config = None
        with open(args.code) as file:
            config = named["config"] = json.load(file)
        # as DeepSpeed-Chat, which leaves the steps to DeepSpeed; a process is `tp_size` ranks wide
        processes = int(os.environ["WORLD_SIZE"]) // config.get("tp_size", 1)
        steps = config.pop("gradient_accumulation_steps")
        config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * processes * steps
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, collate_fn=collate, **named
    )
    report = {
        "train_batch_size": engine.train_batch_size(),
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "dp_world_size": engine.dp_world_size,
        "stage": engine.zero_optimization_stage(),
        "batches": len(loader),
        "optimizer": {k: v for k, v in optimizer.param_groups[0].items() if isinstance(v, int | float | list | tuple)},
        "losses": [],
        "norms": [],
        "lrs": [],
    }
    report["optimizer"].pop("params")
    own = {"ids": [], "losses": [], "elements": held_elements(model)}
    for _ in range(EPOCHS):
        for batch in loader:
            own["ids"].append(batch.pop("ids").tolist())
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            own["losses"].append(loss.item())
            if engine.was_step_applied():
                norm = engine.get_global_grad_norm()
                report["norms"].append(None if norm is None else float(norm))
                report["lrs"].append(engine.get_lr())
    report |= {"global_steps": engine.global_steps, "global_samples": engine.global_samples}
    report |= {"micro_steps": engine.micro_steps, "last_lr": scheduler.get_last_lr()}
    if engine.zero_optimization_stage() < 3:
        model.save_pretrained(args.out / "pretrained", is_main_process=comm.get_rank() == 0)
    saved = engine.save_16bit_model(str(args.out / "16bit"), "pytorch_model.bin")
    if comm.get_rank() == 0:
        write(args.out / "report.json", report | {"saved": saved})
    write_rank(args.out, own)
    comm.barrier()


if __name__ == "__main__":
    main()
