"""What is proven of each registered model type: small configs, each with something that TP may get wrong.

The cases come from the registry and the policies, so a new policy is proven by being registered: its type needs a small
config in ``models.py``, and a line in ``SPECIAL`` for every layout that this config does not have. ``ci/zoo.py`` runs
all cases and writes the table of the docs; ``test_zoo.py`` runs one or two of each type (all with ``-m ''``).
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from models import OWN, config_for
from torch import nn
from transformers import PreTrainedModel

from tp_plugin.cli.dropout import prove_dropout
from tp_plugin.cli.models import build
from tp_plugin.cli.parity import compare
from tp_plugin.cli.parity_result import DropoutResult, Result
from tp_plugin.config.keys import ENV_OPTIONS
from tp_plugin.policy import Attention, Experts, Plan, Policy, make_plan, policies, policy_for
from tp_plugin.policy.names import matches
from tp_plugin.policy.planner import plan_named, replicate_rest
from tp_plugin.policy.scope import Scope

PLAIN, FEW_KEYS, ODD_HEADS, WHOLE_EXPERTS = "plain", "kv heads < tp", "odd heads", "whole experts"

SPECIAL: dict[str, dict[str, dict[str, Any]]] = {
    "bart": {"other heads in the decoder": {"decoder_attention_heads": 3}},
    "beit": {
        "shared positions": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        "absolute positions": {"use_relative_position_bias": False, "use_absolute_position_embeddings": True},
    },
    "clip": {"odd heads in one tower": {"text_config": {**OWN["clip"]["text_config"], "num_attention_heads": 6}}},
    "cohere": {"no q/k norms": {"use_qk_norm": False}},
    "deberta-v2": {
        "projected positions": {"share_att_key": False, "conv_kernel_size": 0},
        "no relative positions": {"relative_attention": False, "pos_att_type": []},
    },
    "dinov2": {"gated": {"use_swiglu_ffn": True}},
    "falcon": {
        "40B": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        "RW": {"multi_query": False, "alibi": True, "parallel_attn": False},
    },
    "gpt2": {"untied": {"tie_word_embeddings": False}},
    "gpt_bigcode": {"a key per head": {"multi_query": False}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "llama": {"tied": {"tie_word_embeddings": True}},
    "llava": {
        "odd heads in the language": {"text_config": {**OWN["llava"]["text_config"], "num_attention_heads": 6}},
        "SigLIP tower": {
            "vision_config": {**OWN["siglip_vision_model"], "model_type": "siglip_vision_model"},
            "vision_feature_select_strategy": "full",
        },
    },
    "marian": {"two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53}},
    "opt": {"350M": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "persimmon": {"no q/k norms": {"qk_layernorm": False}},
    "phi": {"no q/k norms": {"qk_layernorm": False}},
    "stablelm": {"side by side": {"use_parallel_residual": True}},
    "t5": {"not gated": {"feed_forward_proj": "relu"}},
    "whisper": {"odd heads": {"encoder_attention_heads": 6, "decoder_attention_heads": 3}},
}
"""Layouts of an architecture that its small config does not have."""

SHAPES_ONLY: dict[str, dict[str, dict[str, Any]]] = {
    "beit": {"masked": {"use_mask_token": True}},
    "deberta": {"narrow words": {"embedding_size": 32}},
    "deberta-v2": {"narrow words": {"embedding_size": 32}},
    "gpt2": {"decoder of an encoder's states": {"add_cross_attention": True}},
    "whisper": {"weighted layers": {"use_weighted_layer_sum": True}},
}
"""Layouts whose models the proof cannot feed; their plans are made."""

WIDER: dict[str, dict[str, Any]] = {
    "stablelm": {"hidden_size": 96},
    "clip_vision_model": {"hidden_size": 96},
    "helium": {"head_dim": 8},
    "codegen": {"n_head": 4},  # a multiple of 4, which its forward has by heart; of 3 ranks, one has two
}
"""What an odd number of heads wants besides, or another number."""

ODD_SIZES: dict[str, tuple[int, ...]] = {"codegen": (2, 3, 4)}
"""TP sizes for an odd number of heads, where they are not 2 and 4."""

WANTS: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
}
"""What a class wants of the config that others do not."""

OLDER: dict[str, tuple[str, ...]] = {"dinov2": ("block 3 layer.*.attention", "block 4 layer.*.mlp")}
"""By a policy's first type, blocks in it that only older versions of transformers have."""

ONE_INPUT = ("codegen", "cohere", "cohere2", "falcon", "gptj", "phi")
"""Types whose attention and MLP, side by side, have one input: its gradient is summed once for both."""

BESIDES: dict[str, int] = {
    "beit": 2,  # the gradient of each layer's table of position biases
    "llava": -2,  # pictures are taken before the vision tower's last layer: it runs, but has no backward
}
"""All-reduces of a plain case that do not follow from the plan."""


@dataclass(frozen=True)
class Case:
    """One run of the proof."""

    model_type: str
    name: str
    tp: int
    overrides: dict[str, Any] = field(hash=False)
    expert_parallel: bool = False

    def __str__(self) -> str:
        return f"{self.model_type}-{self.name}-tp{self.tp}".replace(" ", "_")

    def config(self) -> Any:
        return config_for(self.model_type, **self.overrides)


def cases(model_type: str) -> Iterator[Case]:
    """All cases of a model type; the first is the plainest."""
    for tp in (2, 4):
        yield Case(model_type, PLAIN, tp, {})
    few, odd = few_keys(model_type), odd_heads(model_type)
    if few:
        yield Case(model_type, FEW_KEYS, 2, few)
    if odd:
        for tp in ODD_SIZES.get(model_type, (2, 4)):
            yield Case(model_type, ODD_HEADS, tp, odd)
    for name, overrides in SPECIAL.get(model_type, {}).items():
        yield Case(model_type, name, 2, overrides)
    if any(isinstance(block, Experts) and block.index for block in policy_for(model_type).blocks):
        for tp in (2, 4):
            yield Case(model_type, WHOLE_EXPERTS, tp, {}, expert_parallel=True)


def few_keys(model_type: str) -> dict[str, Any]:
    """Overrides with one key/value head; empty where there is no such number of its own in the config."""
    return {kv: 1 for heads, kv in _counts(model_type) if kv and kv != heads}


def odd_heads(model_type: str) -> dict[str, Any]:
    """Overrides with 6 query heads and 3 key/value heads, which neither 2 nor 4 ranks share evenly."""
    changed: dict[str, Any] = {}
    for heads, kv in _counts(model_type):
        if kv and kv != heads:
            changed[kv] = 3
        if heads:
            changed[heads] = 6
    return changed and {**changed, **WIDER.get(model_type, {})}


def _counts(model_type: str) -> Iterator[tuple[str, str]]:
    """Names in the config of the numbers of query and of key/value heads, for each kind of attention."""
    config = config_for(model_type)

    def name(count: Any) -> str:
        known = isinstance(count, str) and isinstance(getattr(config, count, None), int)
        return config.attribute_map.get(count, count) if known else ""

    for block in policy_for(model_type).blocks:
        if isinstance(block, Attention):
            yield name(block.heads), name(block.kv_heads)


def heads(model_type: str, overrides: dict[str, Any]) -> Iterator[nn.Module]:
    """A model without weights of every public class for such a config: the bare model and all its heads."""
    config = config_for(model_type, **overrides)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for name in module.__all__:
        cls = getattr(module, name)
        if issubclass(cls, PreTrainedModel) and cls.config_class is type(config) and "pretrained" not in name.lower():
            yield on_meta(config_for(model_type, **overrides, **WANTS.get(name, {})), cls)


def on_meta(config: Any, cls: type[nn.Module] | None = None) -> nn.Module:
    """A model of ``config`` without weights; by default of the class that the proof trains."""
    if cls is None:
        return build(config, meta=True)
    with torch.device("meta"):
        return cls(config)


BELOW = (
    *("columns", "row", "partial", "tensors", "sharded_norms", "input_of", "output_of", "bias_shards", "replicated"),
    "shared_dropouts",
)
"""What a block says of modules and parameters below it."""


def written(policy: Policy) -> set[tuple[str, ...]]:
    """Everything that a policy names in a model."""
    names: set[tuple[str, ...]] = {("replicated", pattern) for pattern in policy.replicated}
    for number, block in enumerate(policy.blocks):
        own = f"block {number} {block.path}"
        names.add((own,))
        for what in (*BELOW, "local_sizes", "methods"):
            names |= {(own, what, name) for name in getattr(block, what, ())}
    if policy.vocabulary is not None:
        embedding, head = policy.vocabulary.embedding, policy.vocabulary.head
        names |= {("embedding", name) for name in ((embedding,) if isinstance(embedding, str) else embedding)}
        names |= {("head", head)} if head else set()
    names |= {("parallel_residual", policy.parallel_residual)} if policy.parallel_residual else set()
    names |= {("towers", pattern) for pattern in policy.towers}
    return names | {("linears", name) for name in policy.linears}


def found(policy: Policy, model: nn.Module) -> set[tuple[str, ...]]:
    """What of :func:`written` is there in ``model``."""
    scope = Scope(model, policy, model.config, Plan(2))
    names: set[tuple[str, ...]] = set()
    for number, block in enumerate(policy.blocks):
        paths = [path for path in scope.matching(block.path) if scope.has(path, block.requires)]
        own = f"block {number} {block.path}"
        names |= {(own,)} if paths else set()
        for what in BELOW:
            for name in getattr(block, what, ()):
                if any(scope.has(path, name.removesuffix("?")) for path in paths):
                    names.add((own, what, name))
        for name in block.local_sizes:
            if any(_has_attribute(scope.modules[path], name.removesuffix("?")) for path in paths):
                names.add((own, "local_sizes", name))
        names |= {
            (own, "methods", name) for name in block.methods if any(hasattr(scope.modules[p], name) for p in paths)
        }
    for kind, *rest in written(policy):
        if kind in ("embedding", "head", "towers") and any(matches(rest[0], path) for path in scope.modules):
            names.add((kind, rest[0]))
    plan_named(scope)
    rest = [name for name in scope.parameters if name not in scope.plan.layouts and scope.covers(name)]
    replicate_rest(scope)
    for name in rest:
        parts = name.split(".")
        prefixes = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
        names |= {("replicated", p) for p in policy.replicated if any(matches(p, prefix) for prefix in prefixes)}
    names |= {("parallel_residual", policy.parallel_residual)} if scope.plan.parallel_residual else set()
    kinds = {type(module).__name__ for module in scope.modules.values()}
    return names | {("linears", name) for name in policy.linears if name in kinds}


def _has_attribute(module: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def layers(plan: Plan) -> list[str]:
    """Paths of the layers that have blocks, each with a dot at its end: ``model.layers.0.``."""
    paths: dict[str, None] = {}
    for path in plan.blocks:
        parts = path.split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            paths[".".join(parts[: at + 1]) + "."] = None
    return list(paths)


def reductions(model_type: str, plan: Plan, below: str = "") -> tuple[int, int]:
    """All-reduces of activations in a forward and a backward of the model that the proof trains, or of one layer."""
    forward, backward = plan.reductions(below)
    if model_type in ONE_INPUT:
        backward -= sum(f"{path}.".startswith(below) for path in plan.parallel_residual)
    if not below and len(plan.embeddings) > 2:
        forward -= 1  # of the three names of a shared embedding, encoder and decoder use their own
    return forward, backward


def plan_of(case: Case) -> tuple[nn.Module, Plan]:
    model = on_meta(case.config())
    return model, make_plan(model, policy_for(case.model_type), case.tp, expert_parallel=case.expert_parallel)


def model_types() -> list[str]:
    """Every registered model type."""
    return sorted(policies())


# --- the proof ------------------------------------------------------------------------------------------------------


def fresh(**options: Any) -> None:
    """Every case begins alike: no mesh of an earlier one, its own options, generators equal on all ranks."""
    from tp_plugin.runtime.start import stop

    stop()
    os.environ[ENV_OPTIONS] = json.dumps(options)
    random.seed(0)
    np.random.seed(0)  # equal generators: the guard has nothing to synchronise
    torch.use_deterministic_algorithms(True)


def prove(case: Case) -> Result:
    """Run on every rank: the sharded model trained beside a plain one."""
    fresh(expert_parallel=case.expert_parallel)
    return compare(case.config(), policy_for(case.model_type), case.tp, steps=6)


def prove_with_dropout(model_type: str, tp: int) -> DropoutResult:
    """Run on every rank: what dropouts draw, and whether the ranks stay one model."""
    fresh()
    return prove_dropout(config_for(model_type), policy_for(model_type), tp)


def faults(results: list[Result]) -> list[str]:
    """What is wrong with the ranks' results, in words."""
    found = {failure for result in results for failure in result.failures()}
    if not found and not all(result.state for result in results):
        found.add("the saved state was not compared")
    if min(result.moved for result in results) < 1e-3:
        found.add("the weights did not move: nothing was tested")
    if any(result.norms != results[0].norms for result in results):
        found.add("ranks clip by different norms")
    return sorted(found)


def dropout_faults(results: list[DropoutResult]) -> list[str]:
    """Likewise; every dropout must be one process'."""
    found = {fault for result in results for fault in result.faults}
    found |= {f"{name} is drawn by each rank for itself" for result in results for name in result.own}
    return sorted(found)
