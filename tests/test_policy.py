"""Policies: what they must say, what happens when they say it wrong, and how they reach the registry."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points

import pytest
import torch
from models import config_for
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import tp_plugin
from model_policies.gpt2 import GPT2
from model_policies.llama import POLICIES
from tp_plugin.errors import PolicyError
from tp_plugin.policy import Policy, Vocabulary, check_config, even, make_plan, policies, policy_for, registry

LLAMA = POLICIES[0]


def meta(model_type: str = "llama", **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_for(model_type, **overrides))


def test_our_policies_come_through_the_public_entry_points() -> None:
    names = {entry.value for entry in entry_points(group="tp_plugin.policies")}
    assert {"model_policies.llama:POLICIES", "model_policies.gpt2:POLICIES"} <= names
    assert policy_for("gpt2") is GPT2
    assert policy_for(config_for("mistral")) is LLAMA


@pytest.mark.parametrize("model_type", sorted({t for p in (*POLICIES, GPT2) for t in p.model_types}))
def test_policy_fits_the_installed_transformers(model_type: str) -> None:
    """Fails, naming the module, if transformers renames one that the policy relies on; and nearly all is sharded."""
    model = meta(model_type)
    plan = make_plan(model, policy_for(model_type), 2)
    assert len(plan.blocks) == 4, "two layers of attention and MLP"
    assert plan.sharded_share(dict(model.named_parameters())) > 0.9


def test_plan_of_llama() -> None:
    plan = make_plan(meta(), LLAMA, 2)
    assert plan.layouts["model.layers.0.self_attn.q_proj.weight"].local_shape(0) == (24, 48)
    assert plan.layouts["model.layers.0.self_attn.o_proj.weight"].local_shape(1) == (48, 24)
    assert plan.layouts["model.layers.0.self_attn.o_proj.bias"].is_sharded is False
    assert plan.layouts["model.layers.1.mlp.up_proj.bias"].local_shape(1) == (40,)
    assert plan.layouts["lm_head.weight"].local_shape(1) == (49, 48)  # 97 rows padded to 98
    assert plan.attributes["model.layers.0.self_attn", "num_key_value_groups"] == (2, 2)


def test_sequence_classification_head_is_replicated() -> None:
    with torch.device("meta"):
        model = LlamaForSequenceClassification(config_for("llama"))
    assert not make_plan(model, LLAMA, 2).layouts["score.weight"].is_sharded


def test_unclaimed_parameter_is_named() -> None:
    policy = dataclasses.replace(LLAMA, replicated=("norm", "layers.*.input_layernorm"))
    with pytest.raises(PolicyError, match=r"nothing in the policy claims model\.layers\.0\.post_attention_layernorm"):
        make_plan(meta(), policy, 2)


def test_renamed_module_is_named() -> None:
    block = dataclasses.replace(LLAMA.blocks[1], columns={"gate_proj": even, "upward_proj": even})
    with pytest.raises(PolicyError, match=r"there is no module 'model\.layers\.0\.mlp\.upward_proj'"):
        make_plan(meta(), dataclasses.replace(LLAMA, blocks=(LLAMA.blocks[0], block)), 2)


def test_renamed_attribute_is_named() -> None:
    block = dataclasses.replace(LLAMA.blocks[0], local={"n_rep": "groups"})
    with pytest.raises(PolicyError, match="has no attribute 'n_rep'"):
        make_plan(meta(), dataclasses.replace(LLAMA, blocks=(block, LLAMA.blocks[1])), 2)


def test_a_pattern_that_finds_nothing_is_an_error() -> None:
    block = dataclasses.replace(LLAMA.blocks[1], path="layers.*.feed_forward")
    with pytest.raises(PolicyError, match=r"layers\.\*\.feed_forward"):
        make_plan(meta(), dataclasses.replace(LLAMA, blocks=(LLAMA.blocks[0], block)), 2)


def test_tied_parameter_with_two_layouts_is_refused() -> None:
    policy = dataclasses.replace(LLAMA, vocabulary=Vocabulary(head=None), replicated=(*LLAMA.replicated, "lm_head"))
    with pytest.raises(PolicyError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one tied parameter"):
        make_plan(meta(tie_word_embeddings=True), policy, 2)


def test_wrapped_linear_is_refused() -> None:
    model = meta()

    class Wrapped(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.down_proj = Wrapped(80, 48, device="meta")
    with pytest.raises(PolicyError, match=r"model\.layers\.0\.mlp\.down_proj is a Wrapped"):
        make_plan(model, LLAMA, 2)


def test_too_many_ranks_is_known_from_the_config() -> None:
    with pytest.raises(PolicyError, match=r"larger than the number of attention heads \(4\)"):
        check_config(config_for("llama"), LLAMA, 8)


def test_no_policy_says_what_to_write() -> None:
    with pytest.raises(PolicyError, match=r"no tensor-parallel policy for model type 'xlnet'(?s:.*)plugin\.register"):
        policy_for("xlnet")


def test_register_goes_before_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    mine = tp_plugin.register(Policy(("llama", "mine")))
    assert policy_for("llama") is mine and policies()["mine"] is mine


def test_two_packages_with_one_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, name: str):
            self.name = self.value = name

        def load(self) -> Policy:
            return Policy(("llama",))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry("one:P"), Entry("two:P")])
    registry.installed.cache_clear()
    try:
        with pytest.raises(PolicyError, match=r"claimed by two entry points(?s:.*)one:P and two:P"):
            registry.installed()
    finally:
        registry.installed.cache_clear()


def test_policy_reference() -> None:
    assert registry.load("model_policies.gpt2:GPT2") is GPT2
    with pytest.raises(PolicyError, match="write `module:NAME`"):
        registry.load("model_policies.gpt2")
    with pytest.raises(PolicyError, match="cannot be loaded"):
        registry.load("model_policies.gpt2:NOTHING")
