"""Models that cannot be had as asked: each checkpoint's weights do not fit its config, so loading them would fail."""

from __future__ import annotations

import traceback

from accelerate import Accelerator
from common import arguments, write_rank
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    args = arguments().parse_args()
    accelerator = Accelerator()
    found = {}
    for path in sorted(args.models.iterdir()):
        for how in ("pretrained", "config"):
            try:
                if how == "pretrained":
                    AutoModelForCausalLM.from_pretrained(path)
                else:
                    accelerator.prepare(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
                found[f"{path.name} from {how}"] = None
            except Exception as error:
                traceback.print_exc()
                found[f"{path.name} from {how}"] = f"{type(error).__name__}: {error}"
    write_rank(args.out, found)


if __name__ == "__main__":
    main()
