"""A quantized base in a script after ``prepare``: training with Accelerator, what its weights say, files, refusals."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from test_quantized import DOUBLE, NARROW, NF4, WIDE, adapted, decoded, quantized, without_repacking
from test_save_state import accelerated
from workers import run, sees_whole

BASES = {"double": (WIDE, DOUBLE), "across": (NARROW, DOUBLE), "int8": (NARROW, {"load_in_8bit": True})}


def script(checkpoint: str, settings: dict[str, Any], root: str, dp: int, plain: bool) -> dict[str, Any]:
    """Train, save the state, train on; then a new script that loads it and trains on."""
    from accelerate import Accelerator

    found: dict[str, Any] = {"seen": []}
    model, optimizer, accelerator = None, None, None

    def start() -> None:
        nonlocal model, optimizer, accelerator
        model = adapted(quantized(checkpoint, settings), "llama")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        if not plain:
            accelerator = Accelerator()
            model, optimizer = accelerator.prepare(model, optimizer)
        model.train()

    def train(first: int) -> None:
        for step in range(first, first + 2):
            if plain:
                losses = [model(**batch(97, dp * step + at)).loss for at in range(dp)]
                sum(losses).div(dp).backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                mean = sum(losses).div(dp)
            else:
                loss = model(**batch(97, dp * step + accelerator.process_index)).loss
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                mean = accelerator.reduce(loss.detach(), "mean")
            optimizer.step()
            optimizer.zero_grad()
            found["seen"].append((mean.item(), float(norm)))

    start()
    train(0)
    bare = model if plain else accelerator.unwrap_model(model)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bare.print_trainable_parameters()
    found["printed"] = printed.getvalue()
    found["shapes"] = {name: (tuple(p.shape), p.numel(), str(p.dtype)) for name, p in bare.named_parameters()}
    found["num_parameters"] = bare.base_model.model.num_parameters()
    if not plain:
        accelerator.save_state(f"{root}/state")
    train(2)
    if not plain:
        found["bare"] = bare
        start()
        accelerator.load_state(f"{root}/state")
        train(2)
    else:
        found["seen"] += found["seen"][2:]
        found["bare"] = bare
    return found


@sees_whole
def script_case(name: str, checkpoint: str, root: str, dp: int) -> dict[str, Any]:
    from tp_plugin.errors import TPError

    settings = BASES[name][1]
    whole = adapted(quantized(checkpoint, settings), "llama")
    with accelerated(2):
        got = script(checkpoint, settings, root, dp, plain=False)
        sharded = got.pop("bare")
        states = [model.base_model.model.state_dict() for model in (whole, sharded)]
        found: dict[str, Any] = {"got": got}
        found["keys"] = [sorted(key for key in state if "nested" not in key) for state in states]
        found["same codes"] = all(torch.equal(v, states[1][k]) for k, v in states[0].items() if k.endswith("r.weight"))
        found["decoded"] = [torch.equal(*pair) for pair in decoded_of(whole, states, settings)]
        weight = next(p for n, p in sharded.named_parameters() if n.endswith("q_proj.base_layer.weight"))
        found["refused"] = []
        scales = "SCB" if name == "int8" else "quant_state"
        for use in (weight.sum, lambda: weight.data, lambda: getattr(weight, scales), lambda: weight.to(torch.int32)):
            with pytest.raises(TPError, match=r"q_proj.*quantized") as error:
                use()
            found["refused"].append(str(error.value))
        sharded.to("cpu")
        return found


def decoded_of(whole: Any, states: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """Each matrix of the model and of the sharded model's state dict."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from tp_plugin.shard.quantized import packed_in

    for path, module in packed_in(whole.base_model.model):
        found = states[1][f"{path}.weight"]
        if "load_in_8bit" in settings:
            yield decoded(module), found * (states[1][f"{path}.SCB"][:, None] / 127)
            continue
        start = f"{path}.weight."
        entries = {key.removeprefix(start): value for key, value in states[1].items() if key.startswith(start)}
        yield decoded(module), dequantize_4bit(found, QuantState.from_dict(entries, torch.device("cpu")))


@pytest.mark.parametrize("name, dp", [("double", 1), ("across", 1), ("int8", 1), ("across", 2)])
def test_script(name: str, dp: int, tmp_path: Path) -> None:
    build(config_for("llama", **BASES[name][0])).save_pretrained(tmp_path / "model")
    expected = script(str(tmp_path / "model"), BASES[name][1], str(tmp_path), dp, plain=True)
    seen, _ = expected.pop("seen"), expected.pop("bare")
    for found in run(2 * dp, script_case, name, str(tmp_path / "model"), str(tmp_path), dp):
        got = found["got"]
        for mine, theirs in zip(got.pop("seen"), seen, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-5)
        assert got == expected
        assert found["keys"][0] == found["keys"][1]
        assert found["same codes"] and all(found["decoded"])


@pytest.mark.parametrize(
    "given, further, words",
    [
        ({"quant_method": "gptq", "bits": 4}, {}, ["gptq", "units of 8", "tp_size"]),
        ({"quant_method": "awq", "bits": 4}, {}, ["awq", "units of 8"]),
        ({"quant_method": "hqq"}, {}, ["hqq", "groups"]),
        ({"quant_method": "fp8"}, {}, ["fp8", "128"]),
        ({"quant_method": "torchao"}, {}, ["torchao"]),
        ({"quant_method": "quark"}, {}, ["quark", "BitsAndBytesConfig"]),
        ({"quant_method": "hqq"}, {"tp_size": 1, "pp_size": 2}, ["hqq", "pp_size"]),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, {}, ["llm_int8_has_fp16_weight"]),
    ],
)
def test_refused_before_weights_load(given: dict[str, Any], further: dict[str, Any], words: list[str]) -> None:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines.quantization import check_quantization
    from tp_plugin.errors import TPError

    options = RunConfig(**{"tp_size": 2, **further})
    with pytest.raises(TPError) as error:
        check_quantization("llama", given, options)
    assert all(word in str(error.value) for word in ["llama", *words])
    check_quantization("llama", given, RunConfig())  # without a tp_size it is nobody's business


def test_an_old_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import quantization
    from tp_plugin.errors import TPError

    monkeypatch.setattr(metadata, "version", lambda name: "0.49.1")
    with pytest.raises(TPError, match=r"bitsandbytes 0\.49\.1 is installed.*0\.50 or later"):
        quantization.check_quantization("llama", NF4, RunConfig(tp_size=2))
    asked = Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8")
    assert f'"bitsandbytes>={quantization.OLDEST}"' in asked


def test_ragged_rows_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    from tp_plugin.engines.quantization import check_linears
    from tp_plugin.errors import PolicyError, TPError
    from tp_plugin.policy import make_plan, policy_for

    config = config_for("llama", **{**WIDE, "intermediate_size": 200})
    build(config).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**NF4))
    with pytest.raises(TPError, match=r"layers\.0\.mlp\.down_proj cannot be split.*200.*llm_int8_skip_modules"):
        check_linears(model)
    with pytest.raises(PolicyError, match=r"down_proj.*200"):
        make_plan(model, policy_for(config), 2)
    skipping = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["down_proj", "lm_head"])
    check_linears(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=skipping))


def test_quantized_head_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tp_plugin.errors import PolicyError
    from tp_plugin.policy import make_plan, policy_for

    config = config_for("llama", **WIDE, tie_word_embeddings=False)
    build(config).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["none"])
    model = without_repacking(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings))
    with pytest.raises(PolicyError, match="lm_head is quantized"):
        make_plan(model, policy_for(config), 2)


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_plugin.engines.quantization import own_device

    assert own_device(None) is None and own_device({"": 0}) == {"": 0}  # no accelerator here
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    mine = {"": torch.device("cuda", 3)}
    assert own_device(None) == own_device({"": 1}) == own_device({"": "cuda:0"}) == mine
    assert own_device({"": "cpu"}) == {"": "cpu"} and own_device({"a": 0, "b": 1}) == {"a": 0, "b": 1}


def test_fsdp2_takes_no_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines.quantization import check_quantization, refuse_fsdp2
    from tp_plugin.errors import TPError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what a worker of it is told
    with pytest.raises(TPError, match=r"llama.*8 bits.*FSDP2.*load_in_4bit"):
        check_quantization("llama", {"load_in_8bit": True}, RunConfig(tp_size=2))
    check_quantization("llama", NF4, RunConfig(tp_size=2))

    build(config_for("llama", **WIDE)).save_pretrained(tmp_path)
    model = quantized(str(tmp_path), NF4)
    refuse_fsdp2(model)
    with pytest.raises(TPError, match=r"q_proj is quantized in 8 bits.*FSDP2.*load_in_4bit"):
        refuse_fsdp2(quantized(str(tmp_path), {"load_in_8bit": True}))


def test_fsdp2_takes_no_parameter_that_layers_share() -> None:
    import peft

    from tp_plugin.engines.quantization import refuse_fsdp2
    from tp_plugin.errors import TPError

    def tuned(config: peft.PeftConfig) -> torch.nn.Module:
        return peft.get_peft_model(build(config_for("llama")), config)

    saved = ["lm_head", "embed_tokens"]
    refuse_fsdp2(tuned(peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True)))
    refuse_fsdp2(tuned(peft.LoraConfig(target_modules="all-linear", modules_to_save=saved)))
    refuse_fsdp2(tuned(peft.VeraConfig(target_modules=["o_proj"])))  # which shares buffers
    for config in (peft.VBLoRAConfig, peft.TinyLoraConfig, peft.UniLoraConfig):
        given = {"vector_length": 4, "num_vectors": 6} if config is peft.VBLoRAConfig else {}
        with pytest.raises(TPError, match=r"o_proj and .*o_proj share a parameter of peft.*FSDP2.*MULTI_GPU"):
            refuse_fsdp2(tuned(config(target_modules=["o_proj"], **given)))
