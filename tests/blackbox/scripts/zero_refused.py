"""Configs that cannot be had: what each way of handing them over says."""

from __future__ import annotations

import json
import os
import traceback

import deepspeed
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from common import arguments, write_rank
from transformers import AutoModelForCausalLM, TrainingArguments


def by_accelerate(args, path):
    Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(path)))


def by_trainer(args, path):
    TrainingArguments(output_dir=str(args.out / "trainer"), deepspeed=str(path))


def by_initialize(args, path):
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=json.loads(path.read_text()))


def main():
    parser = arguments()
    parser.add_argument("--configs", required=True)
    args = parser.parse_args()
    found, environment = {}, dict(os.environ)
    for path in sorted((args.out / args.configs).glob("*.json")):
        for how in (by_accelerate, by_trainer, by_initialize):
            try:
                how(args, path)
                found[f"{path.stem.partition('-')[2]} {how.__name__}"] = None
            except Exception as error:
                traceback.print_exc()
                found[f"{path.stem.partition('-')[2]} {how.__name__}"] = f"{type(error).__name__}: {error}"
            AcceleratorState._reset_state(True)
            os.environ.clear()  # each one is seen as the first of its process
            os.environ.update(environment)
    write_rank(args.out, found)


if __name__ == "__main__":
    main()
