"""DoRA beside sharded layers, against plain PEFT on one process."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import adapter_case, check
from models import build, config_for
from workers import run

from tp_plugin.config.run_config import RunConfig

ONE = {"num_hidden_layers": 1}
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "grouped queries": (2, "llama", {"num_key_value_heads": 1}, {}),
    "dropout": (2, "llama", {"intermediate_size": 75, "attention_dropout": 0.1}, {"lora_dropout": 0.05}),
    "four ranks": (4, "llama", {**ONE, "num_attention_heads": 6, "num_key_value_heads": 3}, {"lora_dropout": 0.5}),
    "uneven heads": (2, "gpt2", {"n_head": 3}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "parallel residual": (2, "gpt_neox", ONE, {}),
    "vocabulary": (
        4,
        "llama",
        ONE,
        {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"]},
    ),
    "head with dropout": (2, "llama", ONE, {"target_modules": ["lm_head", "o_proj"], "lora_dropout": 0.2}),
}


def dora_case(name: str) -> dict[str, Any]:
    import peft

    tp, model_type, overrides, own = CASES[name]
    given = {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": model_type == "gpt2", "use_dora": True, **own}
    return adapter_case(tp, model_type, overrides, peft.LoraConfig(**given))


@pytest.mark.parametrize("name", CASES)
def test_beside_plain_peft(name: str) -> None:
    check(run(CASES[name][0], dora_case, name))


def sent_case() -> tuple[dict[str, int], ...]:
    """What a forward of one layer sends: plain LoRA, DoRA, DoRA with dropout (each on one more kind of linear)."""
    import peft

    def one(**own: Any) -> dict[str, int]:
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"], **own)
        return adapter_case(2, "llama", ONE, config, merges=False)["sent"]

    return one(), one(use_dora=True), one(use_dora=True, lora_dropout=0.1)


def test_what_it_sends() -> None:
    """One sum of a number for each output and row-parallel linear; with dropout W x of what it leaves, too."""
    for plain, dora, dropped in run(2, sent_case):
        assert dora == {**plain, "all_reduce/tp": plain["all_reduce/tp"] + 2}
        assert dropped == {**plain, "all_reduce/tp": plain["all_reduce/tp"] + 4}


def split_tokens_case() -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(r=3, target_modules="all-linear", use_dora=True)
    return adapter_case(2, "llama", ONE, config, RunConfig(tp_size=2, sequence_parallel=True))


def test_sequence_parallel() -> None:
    """Magnitudes beside row-parallel linears act on this rank's tokens."""
    check(run(2, split_tokens_case))


def quantized_case(folder: str) -> dict[str, Any]:
    import peft
    from test_quantized import DOUBLE, quantized

    config = peft.LoraConfig(r=3, target_modules="all-linear", use_dora=True, lora_dropout=0.1)
    return adapter_case(2, "llama", {}, config, merges=False, base=functools.partial(quantized, folder, DOUBLE))


def test_on_codes(tmp_path: Path) -> None:
    """QDoRA: the norms are those of decoded weights, of which a rank may hold more than its features."""
    pytest.importorskip("bitsandbytes")
    from test_quantized import NARROW

    build(config_for("llama", **NARROW, **ONE)).save_pretrained(tmp_path)
    check(run(2, quantized_case, str(tmp_path)))


def test_eight_bits_are_refused() -> None:
    import peft

    from tp_plugin.errors import PolicyError
    from tp_plugin.policy import make_plan, policy_for

    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    model = peft.get_peft_model(build(config_for("llama", **ONE)), config).base_model.model
    state = {"__module__": "bitsandbytes.nn", "state": SimpleNamespace(has_fp16_weights=False)}
    model.model.layers[0].self_attn.q_proj.base_layer.__class__ = type("Linear8bitLt", (torch.nn.Linear,), state)
    with pytest.raises(PolicyError, match="q_proj has DoRA beside a linear in 8 bits, which no test proves"):
        make_plan(model, policy_for("llama"), 2)
