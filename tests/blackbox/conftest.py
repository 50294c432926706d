"""Checkpoints that hide nothing: no bias is zero, no norm weight is one, no size is a round number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from .harness import Bench
from .zero import CASES, LAUNCHES, write_config, write_plan


def _llama(**changes) -> LlamaForCausalLM:
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 90}
    shape |= {"vocab_size": 131, "num_hidden_layers": 2, "max_position_embeddings": 64}
    shape |= {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**(shape | {"bos_token_id": 1, "eos_token_id": 2} | changes)))


def _gpt2(**changes) -> GPT2LMHeadModel:
    shape = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 109, "n_inner": 100}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**(shape | changes)))


BUILDERS = {
    "llama": _llama,
    # heads, key-value heads and width that two ranks cannot share evenly, and one matrix for both ends
    "llama_tied": lambda: _llama(
        num_attention_heads=6, num_key_value_heads=3, intermediate_size=75, vocab_size=127, tie_word_embeddings=True
    ),
    "gpt2": _gpt2,
    "gpt2_dropout": lambda: _gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
}


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            spread = 0.2 if is_norm_weight else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(is_norm_weight))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Paths of the checkpoints, by name; the same bytes in every session."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, build in BUILDERS.items():
        model = build()
        randomize(model)
        model.save_pretrained(root / name)
    with torch.no_grad():  # two rows so small that their gradients are huge: see scripts/scaler.py
        model = BUILDERS["llama"]()
        randomize(model)
        rows = model.get_input_embeddings().weight
        rows[[0, -1]] *= 1e-7 / rows[[0, -1]].abs().amax(1, keepdim=True)
        model.save_pretrained(root / "llama_tiny_rows")
    model = BUILDERS["llama"]()
    randomize(model)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(root / "llama_headless", state_dict=weights)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def zero_launch(bench, checkpoints, tmp_path_factory):
    """Start a layout's chain, or its plain oracle; both once per session."""
    root = tmp_path_factory.mktemp("zero")
    models = checkpoints["llama"].parent

    def start(tp: int, dp: int):
        entry, door, names = LAUNCHES.get((tp, dp), ("zero plain", "", []))
        if tp == 1:
            wanted = [name for (_, other), (_, _, names) in LAUNCHES.items() if other == dp for name in names]
            names = [*dict.fromkeys([*wanted, "fp32_stage3"])]
        folder = root / f"tp{tp}dp{dp}"
        plan = write_plan(folder, names, models, None if tp == 1 or door == "YAML" else tp)
        config = {}
        if entry == "zero accelerate":
            path = write_config(folder / "launched.json", CASES["stage0"][2], tp if door == "JSON" else None)
            config = {"deepspeed_config": {"deepspeed_config_file": path, "zero3_init_flag": True}}
            config |= {"tp_size": tp} if door == "YAML" else {}
        return bench.launch("zero_chain", tp, dp, ("--plan", str(plan)), entry=entry, config=config, timeout=280)

    return start
