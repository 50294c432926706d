"""bf16 autocast, and models that are bf16 themselves: gradients, left in the weights by one huge step; trainings."""

from __future__ import annotations

import torch
from clip import accelerate_clip, gradients, nothing, sgd, total_norm_of, train
from common import arguments, write_rank


def to_bf16(model):
    model.to(torch.bfloat16)


def rounded_to_bf16(model):
    """The same weights, for exact computation."""
    model.to(torch.bfloat16).to(torch.float32)


CASES = {}
for model in ("llama", "llama_tied", "gpt2"):
    CASES[f"gradients of {model}"] = (model, nothing, gradients, total_norm_of(2.0), 1)
    CASES[f"gradients of bf16 {model}"] = (model, to_bf16, gradients, total_norm_of(2.0), 1)
    CASES[f"training of {model}"] = (model, nothing, sgd, accelerate_clip(0.5), 6)


def main():
    parser = arguments()
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    if args.precision == "no":
        for name, (model, change, *rest) in CASES.items():
            CASES[name] = (model, rounded_to_bf16 if change is to_bf16 else change, *rest)
    write_rank(args.out, {name: train(args, name, args.precision, CASES) for name in CASES})


if __name__ == "__main__":
    main()
