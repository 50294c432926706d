"""LoRA merged into a base in codes, and taken out again: bit for bit what PEFT makes of the whole linears."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, build, config_for, install_peft
from test_quantized import DOUBLE, NARROW, WIDE, adapted, quantized
from workers import run

BASES = {
    "double": (WIDE, DOUBLE),
    "across": (NARROW, DOUBLE),
    "int8": ({**NARROW, "num_key_value_heads": 1}, {"load_in_8bit": True}),
}


def merge_case(name: str, checkpoint: str) -> dict[str, Any]:
    from tp_plugin.engines import peft as engine
    from tp_plugin.engines import quantized_merge, torch_utils
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    torch_utils.install()
    install_peft()
    quantized_merge.install(importlib.import_module("peft.tuners.lora.bnb"))
    whole = adapted(quantized(checkpoint, BASES[name][1]), "llama").eval()
    sharded = copy.deepcopy(whole)
    parallelize(sharded, 2)
    objects = {n: id(p) for n, p in sharded.named_parameters()}
    found: dict[str, Any] = {"losses": [], "equal": []}
    inputs = batch(97, 9)

    def compare() -> None:
        with torch.no_grad():
            found["losses"].append([model(**inputs).loss.item() for model in (sharded, whole)])
        states = [codes_of(model) for model in (sharded, whole)]
        found["equal"].append([key for key, value in states[1].items() if not torch.equal(value, states[0][key])])

    compare()
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (sharded, whole):
            engine._merge(getattr(type(model.base_model), change), model.base_model)
        compare()
    found["same objects"] = objects == {n: id(p) for n, p in sharded.named_parameters()}
    sharded.merge_adapter()  # PEFT takes it out itself where adapters are switched off
    whole.merge_adapter()
    with sharded.disable_adapter(), whole.disable_adapter():
        compare()
    sharded, whole = (
        engine._unload(type(model.base_model)._unload_and_optionally_merge, model.base_model)
        for model in (sharded, whole)
    )
    compare()
    names = [[name for name in model.state_dict() if "nested" not in name] for model in (sharded, whole)]
    found["names"] = sorted(names[0]) == sorted(names[1])
    return found


def codes_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The codes of a model's linears, and what is not in codes."""
    return {name: value for name, value in model.state_dict().items() if name.endswith(("weight", "bias"))}


@pytest.mark.parametrize("name", BASES)
def test_beside_plain_peft(name: str, tmp_path: Path) -> None:
    build(config_for("llama", **BASES[name][0])).save_pretrained(tmp_path)
    for found in run(2, merge_case, name, str(tmp_path)):
        assert found["equal"] == [[]] * 5
        rounded = 2e-3 if name == "int8" else 1e-5  # features on the edge of a code, as in test_quantized.py
        for mine, theirs in found["losses"]:
            assert mine == pytest.approx(theirs, rel=rounded)
        assert found["losses"][1][1] != pytest.approx(found["losses"][3][1], rel=1e-4), "the adapter changes something"
        assert found["same objects"] and found["names"]


def variant_case(checkpoint: str) -> str:
    import peft

    from tp_plugin.engines import peft as engine
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    install_peft()
    config = peft.LoraConfig(r=3, target_modules=["o_proj"], use_dora=True)
    sharded = parallelize(peft.get_peft_model(quantized(checkpoint, DOUBLE), config), 2)
    with pytest.raises(TPError, match="is no plain LoRA") as error:
        engine._merge(type(sharded.base_model).merge_adapter, sharded.base_model)
    return str(error.value)


def test_a_variant_is_refused_by_name(tmp_path: Path) -> None:
    build(config_for("llama", **WIDE)).save_pretrained(tmp_path)
    for said in run(2, variant_case, str(tmp_path)):
        assert "o_proj" in said and "save_pretrained" in said
