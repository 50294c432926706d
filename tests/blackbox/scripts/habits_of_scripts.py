"""Every habit of tests/habits on a prepared model: its result, and two numbers of each weight and gradient after it.

Under an engine that keeps gradients elsewhere (ZeRO) those that need none; under ZeRO-3 inside GatheredParameters.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from common import arguments, write, write_rank
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import habits


class Prepared:
    """The model as a script uses it: called by the engine's wrapper, asked by its own name."""

    def __init__(self, wrapper, bare):
        self.wrapper, self.bare = wrapper, bare

    def __call__(self, **batch):
        return self.wrapper(**batch)

    def __getattr__(self, name):
        return getattr(self.bare, name)


def numbers(value):
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        flat = value.detach().double().flatten()
        return flat.tolist() if flat.numel() <= 64 else both(flat)
    if isinstance(value, tuple | list):
        return [number for item in value for number in numbers(item)]
    return [] if value is None else [float(value)]


def both(tensor):
    """Two sums with other weights: an element in another place shows."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    flat = tensor.detach().double().flatten()
    ramp = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)
    return [float(flat.abs().sum()), float((flat * ramp).sum())]


def batches(process):
    generator = torch.Generator().manual_seed(50 + process)
    tokens = torch.randint(0, 100, (2, 9), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def start_again(model, start, accelerator, with_gradients):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    if with_gradients:
        model.zero_grad()
        accelerator.backward(model(**model.batch).loss)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.01).relu_())
    torch.manual_seed(0)


def after(model, with_gradients):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    weights = [both(parameter) for parameter in model.parameters()]
    found = {"weights": [number for two in weights for number in two]}
    if with_gradients:
        grads = [both(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        found["grads"] = [number for two in grads for number in two]
    return found


def main():
    parser = arguments()
    parser.add_argument("--but", default="", help="names of habits that this engine cannot have")
    args = parser.parse_args()
    accelerator = Accelerator()
    bare = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    start = {name: parameter.detach().clone() for name, parameter in bare.named_parameters()}
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3)
    wrapper, optimizer = accelerator.prepare(bare, optimizer)
    model = Prepared(wrapper, accelerator.unwrap_model(wrapper))
    model.batch = batches(accelerator.process_index)
    zero = accelerator.distributed_type.value == "DEEPSPEED"
    gathered = contextlib.nullcontext
    if zero and wrapper.zero_optimization_stage() == 3:
        import deepspeed

        def gathered():
            return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)

    found = {}
    for name, habit in habits.HABITS.items():
        if name in args.but.split(",") or (zero and name in habits.NEED_GRADIENTS):
            continue
        with gathered():
            start_again(model, start, accelerator, not zero)
            result = numbers(habit(model))
            found[name] = {"result": result} | after(model, not zero)
    write_rank(args.out, {"process_index": accelerator.process_index, "found": found})
    if accelerator.is_main_process:
        write(args.out / "report.json", {"names": list(found)})
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
