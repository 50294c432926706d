"""Policies from transformers' own ``base_model_tp_plan``: right where it can be read, refused where it cannot."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_parity import assert_parity
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from workers import run

from tp_plugin.cli.models import build, small_config
from tp_plugin.cli.parity import compare
from tp_plugin.cli.parity_result import Result
from tp_plugin.errors import PolicyError
from tp_plugin.policy import make_plan, policies, policy_for
from tp_plugin.policy.hf_plan import PROVEN, policy_from_plan

HYBRID = {"num_hidden_layers": 4}  # of which the last has attention
PICTURED = ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text", "glm_ocr_text")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
    **{name: {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}} for name in PICTURED},
    "youtu": {"pad_token_id": None},  # whose embedding is zeroed by transformers itself when it is reloaded
}
"""What the generic small config does not get right by itself."""

USUAL = ("cwm", "afmoe", "exaone_moe", "minicpm3", "aria_text", "olmo_hybrid")
"""One of each structure; the rest runs with `-m ''`."""


def imported(model_type: str, tp: int) -> Result:
    """Run on every rank."""
    from tp_plugin.runtime.start import stop

    warnings.filterwarnings("ignore")
    stop()
    random.seed(0)
    np.random.seed(0)
    config = small(model_type, tp)
    return compare(config, policy_for(config), tp)


def small(model_type: str, tp: int) -> Any:
    """At tp 4 with two key/value heads, where it has a number of its own of them."""
    default, settings = CONFIG_MAPPING[model_type](), SETTINGS.get(model_type, {})
    config = small_config(default, **settings)
    few = getattr(config, "num_key_value_heads", None) not in (None, getattr(config, "num_attention_heads", None))
    return small_config(default, **settings, num_key_value_heads=2) if few and tp == 4 else config


@pytest.mark.parametrize(
    "model_type, tp",
    [
        pytest.param(model_type, tp, marks=() if tp == 2 and model_type in USUAL else pytest.mark.full)
        for model_type in sorted(PROVEN)
        for tp in (2, 4)
    ],
)
def test_imported_policy(model_type: str, tp: int) -> None:
    results = run(tp, imported, model_type, tp)
    assert_parity(results)


def test_one_reduction_a_block() -> None:
    """Where the plan's styles would reduce the gradient of each of q, k, v, gate and up."""
    for result in run(2, imported, "cwm", 2):
        assert result.collectives["all_reduce/tp"] == 4 * 2 + 2


def test_no_registered_architecture_is_imported() -> None:
    assert not PROVEN & set(policies()), "these have a policy of their own, which goes before"


def test_a_registered_policy_goes_before_the_plan() -> None:
    assert policy_for(CONFIG_MAPPING["llama"]()) is policies()["llama"]


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("doge", r"base_model_tp_plan of 'doge': layers\.\*\.self_attn has 3 colwise and 2 rowwise modules"),
        ("nemotron_h", r"the style 'embedding_rowwise' of embeddings cannot be imported; write a policy"),
        ("longcat_flash", r"the style 'moe_identity_expert' of layers\.\*\.mlp\.experts\.identity_expert"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(model_type: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_for(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("deepseek_v32", r"nothing in the policy claims model\.layers\.0\.self_attn\.indexer\.wq_b\.weight"),
        ("apertus", r"nothing in the policy claims model\.layers\.0\.mlp\.act_fn\.alpha_p"),
        ("mimo_v2_flash", r"num_key_value_groups is 1, but by the config's head counts groups is 2"),
    ],
)
def test_what_the_plan_forgets_inside_a_block_is_refused_by_name(model_type: str, message: str) -> None:
    config = small_config(CONFIG_MAPPING[model_type]())
    with pytest.raises(PolicyError, match=message):
        make_plan(build(config, meta=True), policy_for(config), 2)


class Config(PretrainedConfig):
    model_type = "made_up"
    num_attention_heads, num_key_value_heads = 4, 2


def test_an_unknown_style() -> None:
    config = Config()
    config.base_model_tp_plan = {
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
        "layers.*.mlp.norm": "odd",
    }
    with pytest.raises(PolicyError, match=r"'made_up': the style 'odd' of layers\.\*\.mlp\.norm cannot be imported"):
        policy_from_plan(config)


def test_no_plan_is_no_policy() -> None:
    assert policy_from_plan(CONFIG_MAPPING["bloom"]()) is None
    assert policy_from_plan(PretrainedConfig()) is None


def test_parameters_inside_a_block_must_be_named() -> None:
    """A norm between two linears of an MLP would get a part of its gradient only."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.norm(self.fc1(x)))

    model = nn.Module()
    layer = nn.Module()
    layer.mlp = Mlp()
    model.layers = nn.ModuleList([layer])
    config = Config()
    config.base_model_tp_plan = {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"}
    with pytest.raises(PolicyError, match=r"claims layers\.0\.mlp\.norm\.weight, layers\.0\.mlp\.norm\.bias"):
        make_plan(model, policy_from_plan(config), 2)
