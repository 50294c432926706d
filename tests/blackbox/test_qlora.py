"""QLoRA as users start it, against the same script on dp plain processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from .compare import close
from .conftest import randomize
from .instruct import write_data, write_tokenizer
from .zero import accelerate, write_config

pytest.importorskip("bitsandbytes")

LOGGED = 2e-5
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, the same in codes, and data sets beside them."""
    root = tmp_path_factory.mktemp("qlora")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=131, num_hidden_layers=2, pad_token_id=0))
    randomize(model)
    model.save_pretrained(root / "model")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(root / "model", quantization_config=settings).save_pretrained(root / "codes")
    write_tokenizer(root / "model")
    write_data(root)
    return root


@pytest.fixture(scope="module", params=["yaml", "stages2"])
def reports(bench, folder, request):
    given = ["--models", str(folder), "--model", "model"]
    if request.param == "stages2":  # which draw other masks: by the layer and the micro-batch
        given += ["--dropout", "0.0"]
    split = bench.run("qlora", 2, 1, given, entry=request.param, timeout=280)
    return split.report, bench.run("qlora", 1, 1, given, timeout=280).report


@pytest.mark.parametrize("name", ["sft", "dpo", "resumed", "eight bits", "saved", "merged", "prefixed"])
def test_script(reports, name):
    """TRL, a resumed Trainer, the same with the usual 8-bit optimizer, and bases that plain transformers loads."""
    got, expected = (report[name] for report in reports)
    if isinstance(got, str):
        assert name == "prefixed" and "PREFIX_TUNING gives keys and values to every layer" in got
        return
    if name == "dpo":  # TRL holds adapters of a quantized base in bf16: gradients have 8 bits, and rewards are small
        known = ("loss", "entropy", "logps/chosen", "logps/rejected")
        logs = [[[entry[key] for key in known] for entry in run["log"][:-1]] for run in (got, expected)]
        close(logs[0][0], logs[1][0], LOGGED, name)
        close(logs[0], logs[1], 1e-4, name)
        return
    close(got, expected, LOGGED, name)
    if "again" in got:
        assert got["again"][-2] == pytest.approx(got["log"][-2])


ENGINES = {
    "ddp": (1, "yaml", ()),
    "stages": (2, "stages2", ()),
    "stages, 8 bits": (1, "stages2", ("--storage", "int8")),
    "ddp, tokens split, compiled": (1, "yaml", ()),
    "zero2": (2, 2, ()),
    "zero3": (2, 3, ()),
    "zero3, 8 bits": (2, 3, ("--storage", "int8")),
    "zero2, stages": (2, 2, ()),
    "fsdp2": (2, "fsdp2", ()),
    "fsdp2, stages": (2, "fsdp2 stages2", ()),
    "fsdp2, split codes": (2, "fsdp2", ("--storage", "float32")),
}


@pytest.mark.parametrize("name", ENGINES)
def test_loop(bench, folder, name):
    """Losses, norms, the adapter in plain PEFT, and a resumed state: ZeRO's and FSDP2's are without the base."""
    dp, engine, codes = ENGINES[name]
    given, config, entry = ("--models", str(folder), "--model", "model", *codes), {}, engine
    unit = 4 if name == "stages, 8 bits" else 2
    if name == "ddp, tokens split, compiled":
        config = {"tp_plugin": {"sequence_parallel": True}, "dynamo_config": {"dynamo_backend": "AOT_EAGER"}}
    if isinstance(engine, int):
        stages = name == "zero2, stages"
        settings = accelerate(engine, gradient_clipping=0.5) | ({"pp_size": 2} if stages else {})
        path = write_config(folder / f"{name}.json", settings, 1 if stages else 2)
        config = {"deepspeed_config": {"deepspeed_config_file": path, "zero3_init_flag": False}}
        entry = "zero accelerate"
    plain = bench.run("qlora_loop", 1, dp, (*given, "--stateless"))
    run = bench.run("qlora_loop", unit, dp, given, entry=entry, config=config, timeout=280)
    close(run.report, plain.report, LOGGED, name)
    if codes or name == "ddp, tokens split, compiled":
        return
    with_base = entry in ("yaml", "stages2")  # under ZeRO and FSDP2 what the script has loaded stays
    unit, entry = (3, "yaml") if with_base else (2, entry)
    other = bench.run("qlora_loop", unit, 1, (*given, "--state", str(run.out / "state")), entry=entry, config=config)
    assert other.report["loaded"] == pytest.approx(plain.report["saved"], rel=LOGGED), "in another layout"
