"""Says that it got as far as having a model."""

from __future__ import annotations

from accelerate import Accelerator
from common import arguments, write_rank
from transformers import AutoModelForCausalLM


def main():
    args = arguments().parse_args()
    Accelerator()
    AutoModelForCausalLM.from_pretrained(args.models / args.model)
    write_rank(args.out, "reached")


if __name__ == "__main__":
    main()
