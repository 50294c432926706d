"""Trainers that people start from, by their command lines: LLaMA-Factory and ms-swift.

They are not among ours: they pin other versions than ours, and bring fifty packages. `docs/howto/trainers.md` says how.
"""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from .compare import LOSS, WEIGHTS, tensors_close, tensors_in
from .harness import Bench
from .instruct import WORDS
from .test_trainers import folder, log_of, rewards_close  # noqa: F401

OPTIONS = (
    "--max_steps 4 --per_device_train_batch_size 4 --logging_steps 1 --learning_rate 1e-3 --lr_scheduler_type constant "
    "--report_to none --bf16 false --seed 3 --max_grad_norm 1 --disable_tqdm true --save_steps 4 --adam_epsilon 1e-6 "
)
LORA = "--finetuning_type lora --lora_target all --lora_rank 4 --lora_dropout 0.05"
LLAMA_FACTORY = {
    "entry": "factory llamafactory-cli", "timeout": 280,
    "config": {"DISABLE_VERSION_CHECK": "1"},  # 0.9.5 says transformers<=5.6
}  # fmt: skip
STAGES = {
    "sft": "--stage sft --dataset sft --finetuning_type full",
    "sft lora": f"--stage sft --dataset sft {LORA}",
    "dpo": "--stage dpo --dataset dpo --finetuning_type full --pref_beta 0.2",
    "dpo lora": f"--stage dpo --dataset dpo --pref_beta 0.2 {LORA}",
}
SWIFT = {"sft": "--tuner_type full", "sft lora": "--tuner_type lora --lora_rank 4 --lora_dropout 0.05"}
SAVED = ("checkpoint-4/model.safetensors", "checkpoint-4/adapter_model.safetensors")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    root, chance = tmp_path_factory.mktemp("factory"), random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    asked = [{"instruction": words(2, 5), "input": "", "output": words(2, 7)} for _ in range(24)]
    judged = [{"instruction": words(2, 5), "chosen": words(2, 7), "rejected": words(2, 7)} for _ in range(24)]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    table = {"sft": {"file_name": "sft.json"}, "dpo": {"file_name": "dpo.json", "ranking": True, "columns": columns}}
    chats = [
        [{"role": "user", "content": words(2, 5)}, {"role": "assistant", "content": words(2, 7)}] for _ in range(24)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for name, content in (("sft", asked), ("dpo", judged), ("dataset_info", table)):
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def alike(runs: list, weights: str, what: str) -> None:
    """A run with a tp_size, and one process without."""
    logs = [log_of(run) for run in runs]
    assert len(logs[1]) == 4 and all("loss" in entry and "grad_norm" in entry for entry in logs[1])
    for at, (entry, other) in enumerate(zip(*logs, strict=True)):
        rewards_close(entry, other, f"{what}[{at}]")
        assert entry == pytest.approx(other, rel=LOSS, abs=LOSS)
    tensors_close(*(tensors_in(run.out / weights) for run in runs), WEIGHTS, what)


@pytest.mark.skipif(find_spec("llamafactory") is None, reason="needs LLaMA-Factory, see docs/howto/trainers.md")
@pytest.mark.parametrize("case", STAGES)
def test_llama_factory(bench: Bench, folder, data, case):  # noqa: F811
    options = (
        f"--do_train true --model_name_or_path {folder / 'model'} --template default --dataset_dir {data} "
        "--cutoff_len 64 --use_cpu true --disable_gradient_checkpointing true "
    ) + OPTIONS + STAGES[case]  # fmt: skip
    runs = [bench.run("train", tp, 1, tuple(options.split()), **LLAMA_FACTORY) for tp in (2, 1)]
    alike(runs, SAVED["lora" in case], case)


@pytest.mark.skipif(find_spec("swift") is None, reason="needs ms-swift, see docs/howto/trainers.md")
@pytest.mark.parametrize("case", SWIFT)
def test_swift(bench: Bench, folder, data, case):  # noqa: F811
    options = (
        f"--model {folder / 'model'} --model_type llama --template dummy --dataset {data / 'chats.jsonl'} "
        "--max_length 64 --add_version false --gradient_accumulation_steps 1 --gradient_checkpointing false "
        "--split_dataset_ratio 0 "
        "--torch_dtype float32 --use_hf true --load_from_cache_file false --dataset_num_proc 1 --attn_impl eager "
    ) + OPTIONS + SWIFT[case]  # fmt: skip
    given = {"entry": "factory swift", "timeout": 280}
    runs = [bench.run("sft", tp, 1, tuple(options.split()), **given) for tp in (2, 1)]
    alike(runs, SAVED["lora" in case], case)
