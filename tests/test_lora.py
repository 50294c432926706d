"""LoRA beside sharded linears, against plain PEFT on one process."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, build, config_for, unpatched
from test_parallel import GQA, rank
from workers import run

VOCABULARY = {
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"], "use_rslora": True},
    "saved": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def lora_case(model_type: str, overrides: dict[str, Any], dropout: float, **own: Any) -> dict[str, Any]:
    """LoRA, on every linear of the blocks if not told otherwise: two steps of two micro-batches beside plain PEFT."""
    import tempfile

    import peft

    from tp_plugin.engines import peft as engine
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    torch_utils.install()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(0)
    targets = ["c_attn", "c_proj", "c_fc"] if model_type == "gpt2" else "all-linear"
    given = {"r": 3, "target_modules": targets, "lora_dropout": dropout, "fan_in_fan_out": model_type == "gpt2", **own}
    settings = peft.LoraConfig(**given)
    whole = peft.get_peft_model(build(config_for(model_type, **overrides)), settings)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0, 0.1)
    sharded = copy.deepcopy(whole)
    parallelize(sharded, 2)
    plan = sharded.base_model.model.tp_record.plan
    mesh = require().mesh
    found: dict[str, Any] = {"losses": [], "norms": [], "columns": []}
    for model in (whole, sharded):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        for step in range(2):
            for micro in range(2):
                loss = model(**batch(97, 2 * step + micro)).loss
                loss.backward()
                found["losses"].append(loss.item())
            if step == 0:
                grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                found[model is sharded] = grads
            found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
    prefix = "base_model.model."
    deviations = {}
    for name, grad in found[True].items():
        gathered = plan.layouts[name.removeprefix(prefix)].gather(mesh.unit_cpu.gather_objects(grad))
        expected = found[False][name]
        deviations[name] = ((gathered - expected).norm() / expected.norm()).item()
    adapter = {k: v for k, v in sharded.state_dict().items() if "lora_" in k}
    plain = whole.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        engine._save_pretrained(unpatched(peft.PeftModel.save_pretrained), sharded, folder)
        reloaded = None
        if rank() == 0:
            reloaded = peft.PeftModel.from_pretrained(build(config_for(model_type, **overrides)), folder)
            reloaded.eval(), whole.eval()
            with torch.no_grad():
                reloaded = (reloaded(**batch(97, 9)).loss - whole(**batch(97, 9)).loss).abs().item()
    for model in (whole, sharded):
        model.eval()
    merged = [
        engine._unload(type(model.base_model)._unload_and_optionally_merge, model.base_model)
        for model in (whole, sharded)
    ]
    states = [model.state_dict() for model in merged]
    with torch.no_grad():
        losses = [model(**batch(97, 9)).loss.item() for model in merged]
    found |= {
        "merged names": list(states[0]) == list(states[1]),
        "merged": max((states[1][name] - value).abs().max().item() for name, value in states[0].items()),
        "merged loss": abs(losses[1] / losses[0] - 1),
    }
    return {
        "merged": [found["merged names"], found["merged"], found["merged loss"]],
        "same gradients": set(found[True]) == set(found[False]),
        "losses": found["losses"], "norms": found["norms"], "grad": max(deviations.values()), "reloaded": reloaded,
        "weight": max((adapter[k] - plain[k]).abs().max().item() for k in adapter),
    }  # fmt: skip


def check(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["same gradients"]
        assert found["losses"][4:] == pytest.approx(found["losses"][:4], rel=1e-5)
        assert found["norms"][2:] == pytest.approx(found["norms"][:2], rel=1e-5)
        assert found["grad"] <= 1e-4 and found["weight"] <= 3e-4
        assert found["reloaded"] is None or found["reloaded"] <= 1e-4
        names, weights, loss = found["merged"]
        assert names and weights <= 3e-4 and loss <= 1e-4


@pytest.mark.parametrize("model_type, overrides", [("llama", GQA), ("gpt2", {}), ("qwen3", {"intermediate_size": 75})])
def test_lora_on_every_linear(model_type: str, overrides: dict[str, Any]) -> None:
    check(run(2, lora_case, model_type, overrides, 0.0))


def vocabulary_case(kind: str) -> dict[str, Any]:
    return lora_case("llama", GQA, 0.0, **VOCABULARY[kind])


@pytest.mark.parametrize("kind", VOCABULARY)
def test_adapters_of_the_vocabulary(kind: str) -> None:
    """LoRA on the head and the embedding (one of whose rows is padding), and both trained whole beside LoRA."""
    check(run(2, vocabulary_case, kind))


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_lora_dropout(dropout: float) -> None:
    """It drops what plain PEFT drops, beside row-parallel layers too; attention drops as well."""
    check(run(2, lora_case, "llama", {"intermediate_size": 75, "attention_dropout": 0.1}, dropout))


def refused_adapters_case(**settings: Any) -> str:
    import peft

    from tp_plugin.errors import PolicyError
    from tp_plugin.policy import make_plan, policy_for

    model = peft.get_peft_model(build(config_for("llama")), peft.LoraConfig(**settings))
    with pytest.raises(PolicyError) as raised:
        make_plan(model.base_model.model, policy_for("llama"), 2)
    return str(raised.value)


def test_other_adapters_are_refused_by_name() -> None:
    variant = refused_adapters_case(target_modules=["q_proj"], init_lora_weights="mica")
    assert "q_proj has a LoRA variant (MiCALinearVariant); of these only DoRA (use_dora=True) can be" in variant
    saved = refused_adapters_case(target_modules=["q_proj"], modules_to_save=["up_proj"])
    assert "mlp.up_proj is in modules_to_save, which can be sharded of the embedding and the head" in saved
