"""``tp-plugin reshard`` plans another tp with the policy and the options that the checkpoint was saved with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, config_for

from tp_plugin.checkpoint.deepspeed_layout import SIDECAR, read_sidecar, sharded, write_sidecar
from tp_plugin.cli.export import export
from tp_plugin.cli.reshard import reshard
from tp_plugin.errors import TPError
from tp_plugin.policy import load, make_plan, policy_for

POLICY = """
from tp_plugin import MLP, Policy, Vocabulary
from tp_plugin.policy import even

POLICY = Policy(
    ("llama",),
    (MLP("layers.*.mlp", columns={"gate_proj": even, "up_proj": even}, row={"down_proj": even}),),
    Vocabulary(),
    ("layers.*.self_attn.*", "layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"),
)
"""
"""Attention stays whole."""


@pytest.fixture
def attention_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "attention_whole.py").write_text(POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "attention_whole:POLICY"


def saved(folder: Path, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """What a run at tp 2 saves without ZeRO and optimizer; the full weights."""
    policy = load(options["policy"]) if "policy" in options else policy_for(model.config)
    plan = make_plan(model, policy, 2, expert_parallel=options.get("expert_parallel", False))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for rank in range(2):
        state = {name: plan.layouts[name].shard(weight, rank) for name, weight in weights.items()}
        sizes = {"mp_world_size": 2, "dp_world_size": 1}
        folder.mkdir(exist_ok=True)
        file = folder / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": state, "optimizer": None, "ds_config": {}, **sizes}, file)
    about = {"config": model.config.to_dict(), "model_class": type(model).__name__}
    write_sidecar(folder, {"tp_size": 2, "dp_size": 1, "layouts": plan.layouts, "tp_plugin": options, **about})
    return weights


def gathered(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    export(folder, folder.with_name("exported"), None, "float32", 10**9)
    return load_file(folder.with_name("exported") / "model.safetensors")


def test_the_policy_that_was_named(attention_whole: str, tmp_path: Path) -> None:
    model = build(config_for("llama", tie_word_embeddings=False))
    weights = saved(tmp_path / "saved", model, policy=attention_whole)
    reshard(tmp_path / "saved", tmp_path / "out", None, 4, 1)
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar["tp_plugin"] == {"policy": attention_whole}
    assert sidecar["layouts"] == sharded(make_plan(model, load(attention_whole), 4).layouts)
    assert not any("self_attn" in name for name in sidecar["layouts"])
    found = gathered(tmp_path / "out")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_policy_that_is_not_named_is_noticed(attention_whole: str, tmp_path: Path) -> None:
    """As with one that a script passes to ``parallelize``: nothing says how it splits the model at another tp."""
    model = build(config_for("llama", tie_word_embeddings=False))
    saved(tmp_path / "saved", model, policy=attention_whole)
    sidecar = json.loads((tmp_path / "saved" / SIDECAR).read_text())
    (tmp_path / "saved" / SIDECAR).write_text(json.dumps({**sidecar, "tp_plugin": {}}))
    with pytest.raises(TPError, match=r"self_attn\.\w+\.(weight|bias) differs.*or reshard to --tp 1"):
        reshard(tmp_path / "saved", tmp_path / "out", None, 4, 1)
    reshard(tmp_path / "saved", tmp_path / "out", None, 1, 1)


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize("version", ["this one", "one that did not save the options"])
def test_experts_are_split_as_before(version: str, expert_parallel: bool, tmp_path: Path) -> None:
    model = build(config_for("mixtral", num_local_experts=4))
    weights = saved(tmp_path / "saved", model, expert_parallel=expert_parallel)
    if version != "this one":
        sidecar = json.loads((tmp_path / "saved" / SIDECAR).read_text())
        del sidecar["tp_plugin"]
        (tmp_path / "saved" / SIDECAR).write_text(json.dumps(sidecar))
    reshard(tmp_path / "saved", tmp_path / "out", None, 4, 1)
    plan = make_plan(model, policy_for(model.config), 4, expert_parallel=expert_parallel)
    assert read_sidecar(tmp_path / "out")["layouts"] == sharded(plan.layouts)
    found = gathered(tmp_path / "out")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["pipeline", "NoSuchModel", None])
def test_a_sidecar_that_names_no_model_class(name: str | None, tmp_path: Path) -> None:
    """Nothing of transformers is called but a model."""
    saved(tmp_path / "saved", build(config_for("llama")))
    sidecar = json.loads((tmp_path / "saved" / SIDECAR).read_text())
    (tmp_path / "saved" / SIDECAR).write_text(json.dumps({**sidecar, "model_class": name}))
    with pytest.raises(TPError, match="reshard to --tp 1"):
        reshard(tmp_path / "saved", tmp_path / "out", None, 4, 1)
