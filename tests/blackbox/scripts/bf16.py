"""bf16 autocast: one huge step, which leaves the gradient in the weights, and a short training."""

from __future__ import annotations

from clip import accelerate_clip, gradients, nothing, sgd, total_norm_of, train
from common import arguments, write_rank

CASES = {}
for model in ("llama", "llama_tied", "gpt2"):
    CASES[f"gradients of {model}"] = (model, nothing, gradients, total_norm_of(2.0), 1)
    CASES[f"training of {model}"] = (model, nothing, sgd, accelerate_clip(0.5), 6)


def main():
    parser = arguments()
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    write_rank(args.out, {name: train(args, name, args.precision, CASES) for name in CASES})


if __name__ == "__main__":
    main()
