"""What cannot be had is refused, at once, on every rank, with words that help."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CTRLConfig, CTRLLMHeadModel, LlamaConfig, LlamaForCausalLM, XLNetConfig, XLNetLMHeadModel

from .compare import LOSS, close, tensors_close, tensors_in

GUARDED = {"after two steps": ("--same", "4"), "at once, ragged": ("--same", "0", "--ragged")}


@pytest.fixture(scope="module", params=GUARDED)
def guarded(request, bench, checkpoints):
    args = ("--models", str(checkpoints["llama"].parent), *GUARDED[request.param])
    return bench.launch("guard", 2, 1, args, timeout=90), int(args[3]) // 2


def test_different_batches_stop_every_rank_at_their_step(guarded):
    run, good_steps = guarded
    assert run.code != 0
    for rank, own in enumerate(run.ranks):
        assert own["error"], f"rank {rank} went on training on another batch than its peer\n{run.tail()}"
        assert len(own["losses"]) == good_steps, f"rank {rank} noticed after {len(own['losses'])} steps"
        assert own["seconds"] < 30


def test_different_batches_are_named(guarded):
    run, good_steps = guarded
    for own in run.ranks:
        message = own["error"].lower()
        assert "batch" in message and "rank" in message, message
        steps = [int(number) for number in re.findall(r"(?:step|forward)\D{0,12}(\d+)", message)]
        assert {good_steps, good_steps + 1} & set(steps), f"which step, of {good_steps} good ones? {message}"


@pytest.fixture(scope="module")
def refused(bench, tmp_path_factory):
    """Checkpoints whose weights do not fit: whoever starts to load them fails with other words."""
    root = tmp_path_factory.mktemp("refused")
    llama = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "intermediate_size": 64}
    configs = {
        "xlnet": XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=64),
        "ctrl": CTRLConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, dff=64, n_positions=32),
        "two_heads": LlamaConfig(**llama, num_attention_heads=2, num_key_value_heads=2),
        "quantized": LlamaConfig(**llama, num_attention_heads=4, num_key_value_heads=4),
    }
    builders = {"xlnet": XLNetLMHeadModel, "ctrl": CTRLLMHeadModel}
    for name, config in configs.items():
        model = builders.get(name, LlamaForCausalLM)(config)
        rows = model.get_input_embeddings()
        rows.weight = torch.nn.Parameter(torch.zeros(7, 5))
        model.save_pretrained(root / name)
    config = LlamaConfig.from_pretrained(root / "quantized")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(root / "quantized")
    run = bench.run("refused", 4, 1, ("--models", str(root)))
    return run


@pytest.mark.parametrize("model", ["xlnet", "ctrl"])
def test_architecture_without_policy(refused, model):
    for own in refused.ranks:
        for how in ("pretrained", "config"):
            message = own[f"{model} from {how}"]
            assert message, f"{model} from {how} was accepted"
            assert model in message.lower(), message
            assert "policy" in message.lower() and "register" in message.lower(), f"what to write? {message}"
            assert "mismatch" not in message, f"the weights were loaded before: {message}"


def test_more_ranks_than_heads(refused):
    for own in refused.ranks:
        for how in ("pretrained", "config"):
            message = own[f"two_heads from {how}"]
            assert message, f"from {how}: accepted"
            assert "head" in message and "2" in message and "4" in message, message


def test_quantized_model(refused):
    for own in refused.ranks:
        message = own["quantized from pretrained"]
        assert message and "quanti" in message and "tp_size" in message, message


WRONG = {
    # the config beside num_processes, and what the message has to speak of
    "does not divide": (4, {"tp_size": 3}, ["tp_size", "3", "4"]),
    "larger than the world": (2, {"tp_size": 4}, ["tp_size", "4", "2"]),
    "not a number": (2, {"tp_size": "two"}, ["tp_size", "two"]),
    "not positive": (2, {"tp_size": -2}, ["tp_size", "-2"]),
    "unknown option": (2, {"tp_size": 2, "tp_plugin": {"sequence_paralel": True}}, ["tp_plugin", "sequence_paralel"]),
    "options are no mapping": (2, {"tp_size": 2, "tp_plugin": "fast"}, ["tp_plugin", "fast"]),
    "accelerate's own beside ours": (
        2,
        {"tp_size": 2, "parallelism_config": {"parallelism_config_tp_size": 2}},
        ["parallelism_config_tp_size", "tp_size"],
    ),
    "nested, which accelerate ignores": (2, {"parallelism_config": {"tp_size": 2}}, ["parallelism_config", "tp_size"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_keys(bench, checkpoints, case):
    world, config, words = WRONG[case]
    args = ("--models", str(checkpoints["llama"].parent))
    # None takes away the tp_size that the harness writes
    run = bench.launch("reached", world, 1, args, config={"tp_size": None} | config, timeout=60)
    assert run.code != 0, f"accepted\n{run.tail()}"
    assert not list(run.out.glob("rank*.json")), "the script got its model before anybody objected"
    # said once and together, not scattered over a traceback's lines
    lines = [line for line in run.output.splitlines() if all(word in line for word in words)]
    assert lines, f"no line names {words}\n{run.tail()}"


def test_overflow_in_one_shard_skips_the_step_everywhere(bench, checkpoints):
    args = ("--models", str(checkpoints["llama"].parent), "--model", "llama_tiny_rows")
    run, plain = (bench.run("scaler", tp, 1, args) for tp in (2, 1))
    for found in (*run.ranks, plain.report):  # one row overflows, which lies on one rank, and which each sees
        assert [step["infinite here"] for step in found["steps"]] == [0, 1, 0, 1, 0], "not the case to be tested"
    for own in run.ranks:
        scales, expected = ([step["scale"] for step in steps] for steps in (own["steps"], plain.report["steps"]))
        assert scales == expected
        losses, expected = ([step["loss"] for step in steps] for steps in (own["steps"], plain.report["steps"]))
        close(losses, expected, LOSS, "losses")
    tensors_close(*(tensors_in(r.out / "state.safetensors") for r in (run, plain)), 1e-6, "weights")
