"""HF Trainer, TRL and PEFT beyond the ordinary: scripts of many trainers, against the same on dp plain processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig

from .compare import LOSS, WEIGHTS, close, tensors_close, tensors_in
from .conftest import randomize
from .instruct import write_data, write_tokenizer
from .scripts.common import unclocked
from .zero import accelerate, write_config

BETA = 0.2  # the larger of those in scripts/tuners.py
TRAINERS = (
    "averaged",
    "unaveraged",
    "whole_metrics",
    "fitting",
    "resumed",
    "resumed_adapter",
    "classified",
    "generated",
)
TUNERS = ("sft", "sft_packed", "sft_lora", "dpo", "dpo_before", "dpo_lora", "sft_mixture", "dpo_mixture")
MIXTURE = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
SAMPLED = "--num_generations 2 --max_completion_length 8 --reward_funcs judges.moody"
COMMANDS = {
    "sft": "--dataset_name {root}/chat --assistant_only_loss true",
    "dpo": "--dataset_name {root}/preference --beta 0.2",
    "kto": "--dataset_name {root}/judged --beta 0.2",
    "reward": "--dataset_name {root}/preference",
    "grpo": "--dataset_name {root}/preference " + SAMPLED,
    "rloo": "--dataset_name {root}/preference " + SAMPLED,
}
"""TRL's scripts, by its command line. The judge of a TP group's other ranks says the opposite of the first's."""
LAYOUTS = [(2, 2), pytest.param(2, 1, marks=pytest.mark.full)]


@pytest.fixture(scope="session")
def folder(checkpoints, tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, and data sets beside it."""
    root = tmp_path_factory.mktemp("instruct")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.config.pad_token_id = 0
    model.save_pretrained(root / "model")
    write_tokenizer(root / "model")
    mixture = MixtralConfig(vocab_size=model.config.vocab_size, **MIXTURE)
    made = AutoModelForCausalLM.from_config(mixture)
    randomize(made)
    made.save_pretrained(root / "mixture")
    write_tokenizer(root / "mixture")
    write_data(root)
    return root


@pytest.fixture(scope="session")
def start(bench, folder):
    def run(script: str, tp: int, dp: int, entry: str = "yaml", config: dict | None = None):
        given = ("--models", str(folder), "--model", "model")
        return bench.run(script, tp, dp, given, entry=entry, config=config, timeout=280).report

    return run


@pytest.mark.parametrize("tp, dp", LAYOUTS)
@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(start, case, tp, dp):
    got, expected = (start("trainers", t, dp)[case] for t in (tp, 1))
    assert isinstance(expected, dict), expected
    close(got, expected, LOSS, case)
    assert "resumed" not in case or got["exact"]


@pytest.mark.parametrize("tp, dp", LAYOUTS)
def test_trainer_in_bf16(start, tp, dp):
    got, expected = (start("trainers", t, dp)["half"] for t in (tp, 1))
    close(got, expected, 1e-3, "losses")  # 8 bits: two runs that add in another order


def rewards_close(got: dict, expected: dict, what: str) -> None:
    """Take DPO's rewards, β (log π - log π_ref), out of one entry of a log and compare them.

    Differences of nearly equal numbers: their error is that of the log-probabilities. Before the first step all are
    ties that rounding decides, also on one process, and then their signs (`accuracies`) are not compared.
    """
    size = max((abs(value) for name, value in expected.items() if "logps/" in name), default=0.0)
    names = [name for name in expected if "rewards/" in name]
    tied = all(abs(expected[name]) < LOSS for name in names if not name.endswith("accuracies"))
    for name in names:
        a, b = got.pop(name), expected.pop(name)
        if not (tied and name.endswith("accuracies")):
            assert abs(a - b) <= BETA * LOSS * size, f"{what}, {name}: {a!r} instead of {b!r}"


@pytest.mark.parametrize("tp, dp", LAYOUTS)
@pytest.mark.parametrize("case", TUNERS)
def test_trl(start, case, tp, dp):
    assert_tuned(start("tuners", tp, dp)[case], start("tuners", 1, dp)[case], case)


@pytest.mark.full
@pytest.mark.parametrize("case", TUNERS)
def test_trl_under_fsdp2(start, case):
    assert_tuned(
        start("tuners", 2, 2, "fsdp2", {"fsdp_state_dict_type": "FULL_STATE_DICT"})[case],
        start("tuners", 1, 2)[case],
        case,
    )


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", TUNERS)
def test_trl_under_zero(start, folder, case, stage):
    path = write_config(folder / f"zero{stage}.json", accelerate(stage, gradient_clipping="auto"), 2)
    config = {"deepspeed_config": {"deepspeed_config_file": path, "zero3_init_flag": False}}
    assert_tuned(start("tuners", 2, 2, "zero accelerate", config)[case], start("tuners", 1, 2)[case], case)


@pytest.mark.parametrize("method, tp, dp", [
    ("sft", 2, 1),
    *(pytest.param(method, 2, 2, marks=pytest.mark.full) for method in COMMANDS),
])  # fmt: skip
def test_trl_by_its_command_line(bench, folder, method, tp, dp):
    options = (
        f"--model_name_or_path {folder / 'model'} --dtype float32 --max_steps 4 --per_device_train_batch_size 4 "
        "--logging_steps 1 --learning_rate 1e-3 --report_to none --use_cpu true --bf16 false --seed 3 --max_grad_norm 1"
        " --gradient_checkpointing false --disable_tqdm true --save_steps 4 --adam_epsilon 1e-6 "
    ) + COMMANDS[method].format(root=folder)  # fmt: skip
    launches = ((t, dp, tuple(options.split())) for t in (tp, 1))
    runs = [bench.run(method, *given, entry="trl", timeout=280, real=given[0] > 1) for given in launches]
    logs = [log_of(run) for run in runs]
    assert len(logs[1]) == 4
    for at, (entry, other) in enumerate(zip(*logs, strict=True)):
        rewards_close(entry, other, f"{method}[{at}]")
        assert entry == pytest.approx(other, rel=LOSS, abs=LOSS)  # some are means around 0: KL, KTO's logits
    tensors_close(*(tensors_in(run.out / "model.safetensors") for run in runs), WEIGHTS, method)


def log_of(run) -> list[dict]:
    """What a trainer logged, less what a clock says."""
    log = json.loads((run.out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [unclocked(entry) for entry in log]


def assert_tuned(got: dict | str, expected: dict | str, case: str) -> None:
    """Against DDP on plain processes, whose numbers every engine has."""
    got, expected = copy.deepcopy(got), copy.deepcopy(expected)
    assert isinstance(expected, dict), expected
    assert isinstance(got, dict), got
    for at, (entry, other) in enumerate(zip(got["log"], expected["log"], strict=True)):
        rewards_close(entry, other, f"{case}.log[{at}]")
    close(got, expected, LOSS, case)
