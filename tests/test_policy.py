"""Policies: what they must say, what happens when they say it wrong, and how they reach the registry."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import transformers
from models import config_for
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import tp_plugin
from model_policies.gpt2 import GPT2
from model_policies.llama import POLICIES
from tp_plugin.errors import PolicyError
from tp_plugin.policy import (
    MLP,
    Attention,
    Block,
    Experts,
    Policy,
    Vocabulary,
    check_config,
    even,
    make_plan,
    policies,
    policy_for,
    q,
    registry,
)

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
    block = dataclasses.replace(LLAMA.blocks[0], local_sizes={"n_rep": "groups"})
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


@pytest.mark.parametrize(
    "make, new, value",
    [
        (lambda: Attention("a", at="self"), "entry", "self"),
        (lambda: Attention("a", local={"n": "groups"}), "local_sizes", {"n": "groups"}),
        (lambda: Attention("a", wide_norms={"norm": q}), "sharded_norms", {"norm": q}),
        (lambda: MLP("m", having="up"), "requires", "up"),
        (lambda: Block("b", {}, {}, having="up"), "requires", "up"),
        (lambda: Experts("e", once=("bias",)), "bias_shards", ("bias",)),
        (lambda: Experts("e", eager_parts=False), "eager_supports_ep", False),
        (lambda: Policy(("t",), side_by_side="h.*"), "parallel_residual", "h.*"),
        (lambda: Policy(("t",), side_by_side_if=callable), "parallel_residual_if", callable),
        (lambda: dataclasses.replace(LLAMA.blocks[0], local={"n": "groups"}), "local_sizes", {"n": "groups"}),
    ],
)
def test_renamed_keywords_are_accepted_with_a_warning(make: Callable[[], Any], new: str, value: object) -> None:
    with pytest.warns(DeprecationWarning, match=rf"\(\w+=…\) is deprecated .*write {new}=…$"):
        assert getattr(make(), new) == value


def test_new_keywords_do_not_warn_and_unknown_ones_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = Attention("a", entry="self", requires="q", local_sizes={"n": "groups"})
        assert dataclasses.replace(block, entry="").local_sizes == {"n": "groups"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'onse'"):
        Experts("e", onse=("bias",))


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


# --- models of models -----------------------------------------------------------------------------------------------


def composite(cls: str, model_type: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(transformers, cls)(config_for(model_type, **overrides))


def test_each_tower_is_split_by_its_own_head_count() -> None:
    model = composite("CLIPModel", "clip")  # 4 heads read, 8 heads look
    plan = make_plan(model, policy_for("clip"), 4)
    assert plan.attributes["text_model.encoder.layers.0.self_attn", "num_heads"] == (1, 1, 1, 1)
    assert plan.attributes["vision_model.encoder.layers.1.self_attn", "num_heads"] == (2, 2, 2, 2)
    assert plan.layouts["vision_model.encoder.layers.0.mlp.fc1.weight"].local_shape(3) == (20, 64)
    assert not plan.layouts["visual_projection.weight"].is_sharded and not plan.layouts["logit_scale"].is_sharded


def test_a_head_beside_its_tower() -> None:
    """LLaVA's lm_head is tied to the embedding in the language model: both are claimed, and lie alike."""
    model = composite("LlavaForConditionalGeneration", "llava")
    model.tie_weights()
    plan = make_plan(model, policy_for("llava"), 2)
    assert plan.heads == ["lm_head"] and plan.embeddings == ["model.language_model.embed_tokens"]
    assert plan.layouts["lm_head.weight"] == plan.layouts["model.language_model.embed_tokens.weight"]
    assert plan.layouts["lm_head.weight"].is_sharded
    assert len(plan.blocks) == 8, "two layers of attention and MLP in each tower"


def test_one_tower_alone() -> None:
    plan = make_plan(composite("CLIPForImageClassification", "clip"), policy_for("clip"), 2)
    assert len(plan.blocks) == 4 and not plan.embeddings


def test_patterns_stop_at_towers() -> None:
    """The whole model's `replicated` takes nothing of a tower, and the tower's nothing of the model around it."""
    whole = policy_for("clip")
    greedy = dataclasses.replace(whole, replicated=(*whole.replicated, "encoder", "text_model"))
    model = composite("CLIPModel", "clip")
    assert make_plan(model, greedy, 2).layouts == make_plan(model, whole, 2).layouts
    forgetful = dataclasses.replace(whole, replicated=("logit_scale",))
    with pytest.raises(PolicyError, match=r"clip does not fit this CLIPModel: (?s:.*)claims visual_projection\.weight"):
        make_plan(model, forgetful, 2)


def test_a_tower_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = policy_for("clip_vision_model")
    lacking = dataclasses.replace(vision, replicated=vision.replicated[1:])
    monkeypatch.setattr(registry, "_registered", {"clip_vision_model": lacking})
    with pytest.raises(
        PolicyError,
        match=r"the policy for clip_vision_model does not fit this CLIPVisionModel \(model\.vision_tower\)(?s:.*)"
        r"claims model\.vision_tower\.encoder\.layers\.0\.layer_norm1\.weight",
    ):
        make_plan(composite("LlavaForConditionalGeneration", "llava"), policy_for("llava"), 2)


def test_too_many_ranks_for_a_tower() -> None:
    with pytest.raises(PolicyError, match=r"text_config \(clip_text_model\): tp_size=8 is larger(?s:.*)heads \(4\)"):
        check_config(config_for("clip"), policy_for("clip"), 8)
    with pytest.raises(PolicyError, match=r"text_model\.encoder\.layers\.0\.self_attn: tp_size=8 is larger"):
        make_plan(composite("CLIPModel", "clip"), policy_for("clip"), 8)


def test_a_tower_without_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the way out, which is `leave_whole`: then every rank holds the tower whole."""
    known = policies()
    monkeypatch.setattr(registry, "policies", lambda: {k: v for k, v in known.items() if k != "clip_vision_model"})
    config, policy, model = (
        config_for("llava"),
        policy_for("llava"),
        composite("LlavaForConditionalGeneration", "llava"),
    )
    with pytest.raises(
        PolicyError, match=r"model\.vision_tower: no tensor-parallel policy for model type 'clip_vision"
    ):
        make_plan(model, policy, 2)
    with pytest.raises(PolicyError, match=r"vision_config (?s:.*)leave_whole: \[clip_vision_model\]"):
        check_config(config, policy, 2)
    check_config(config, policy, 2, ("clip_vision_model",))
    plan = make_plan(model, policy, 2, leave_whole=("clip_vision_model",))
    assert len(plan.blocks) == 4 and all(path.startswith("model.language_model.") for path in plan.blocks)
    assert not plan.layouts["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].is_sharded


def test_a_tower_whose_config_is_misspelt() -> None:
    policy = dataclasses.replace(policy_for("llava"), towers={"language_model": "txt_config"})
    with pytest.raises(
        PolicyError, match=r"model\.language_model is a tower, but the model's config has no 'txt_config'"
    ):
        make_plan(composite("LlavaForConditionalGeneration", "llava"), policy, 2)


@pytest.mark.parametrize("gated", [False, True])
def test_a_block_of_another_kind(gated: bool) -> None:
    """DINOv2 has one of two MLPs under one name; the policy has a line for each."""
    plan = make_plan(composite("Dinov2Model", "dinov2", use_swiglu_ffn=gated), policy_for("dinov2"), 2)
    assert plan.layouts[f"encoder.layer.0.mlp.{'gate_proj' if gated else 'fc1'}.weight"].is_sharded
    assert len(plan.blocks) == 4


def test_a_head_that_uses_the_embedding_itself_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"nothing in the policy claims lm_predictions\.lm_head\.bias"):
        make_plan(composite("DebertaV2ForMaskedLM", "deberta-v2", legacy=False), policy_for("deberta-v2"), 2)


def test_a_shared_dropout_that_is_not_there() -> None:
    attention = dataclasses.replace(policy_for("deberta-v2").blocks[0], shared_dropouts=("self.rel_dropout",))
    policy = dataclasses.replace(policy_for("deberta-v2"), blocks=(attention, *policy_for("deberta-v2").blocks[1:]))
    with pytest.raises(
        PolicyError, match=r"there is no module deberta\.encoder\.layer\.0\.attention\.self\.rel_dropout"
    ):
        make_plan(composite("DebertaV2ForMaskedLM", "deberta-v2"), policy, 2)
