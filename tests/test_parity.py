"""Every architecture against one process: loss, every gradient, norm, clipped AdamW steps, weights, collectives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from models import config_for
from workers import run

from tp_plugin.cli.parity import Result, compare
from tp_plugin.policy import policy_for

LAYERS = 2

FAMILY = [
    "llama", "mistral", "ministral", "qwen2", "gemma", "granite", "smollm3", "olmo", "helium", "seed_oss",
    "gemma2", "gemma3_text", "qwen3", "arcee", "starcoder2", "gpt2",
]  # fmt: skip

ZOO = [
    "stablelm", "ernie4_5", "cohere", "cohere2", "glm", "glm4", "nemotron", "olmo2", "exaone4", "phi", "phi3",
    "gpt_neo", "gptj", "codegen", "gpt_neox", "persimmon", "gpt_bigcode", "opt", "xglm", "biogpt", "bloom", "falcon",
    "mpt", "bert", "roberta", "electra", "distilbert",
]  # fmt: skip

SHAPES = {
    "kv replicated": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "one kv head a rank": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "no grouping": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "uneven groups": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "uneven replicas": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}),
    "uneven width": ("llama", {"intermediate_size": 75}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd gpt2": ("gpt2", {"n_head": 6, "n_inner": 77}),
    "untied gpt2": ("gpt2", {"tie_word_embeddings": False}),
    "tiny vocabulary": ("llama", {"vocab_size": 5, "pad_token_id": 4}),
    "padding on the second rank": ("llama", {"pad_token_id": 90}),
    "eager attention": ("llama", {"attn_implementation": "eager"}),
}


def parity(model_type: str, overrides: dict[str, Any], tp: int) -> Result:
    """Run on every rank: the largest deviations of the sharded model from a plain one, trained side by side."""
    from tp_plugin.parallel.mesh import forget_mesh

    forget_mesh()
    random.seed(0)
    np.random.seed(0)  # equal generators: the guard has nothing to synchronise
    torch.use_deterministic_algorithms(True)
    config = config_for(model_type, **overrides)
    return compare(config, policy_for(config), tp, steps=6)


def assert_parity(results: list[Result]) -> None:
    for result in results:
        assert result.failures() == [], result
        assert result.state and result.generation is not False, result
        assert result.moved > 1e-3, "the weights did not move: nothing was tested"
        assert result.norms == results[0].norms, "ranks clip by different norms"


AT_FOUR = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2")


@pytest.mark.parametrize(
    "model_type, tp",
    [
        pytest.param(model_type, tp, marks=() if tp == 2 or model_type in AT_FOUR else pytest.mark.full)
        for model_type in FAMILY
        for tp in (2, 4)
    ],
)
def test_architecture(model_type: str, tp: int) -> None:
    results = run(tp, parity, model_type, {}, tp)
    assert_parity(results)
    for result in results:
        # per layer 2 forward + 2 backward, the embedding's forward, the head's backward; nothing else but q/k norms
        partial = 2 * LAYERS if model_type in ("qwen3", "gemma3_text") else 0
        assert result.collectives.pop("all_reduce/tp") == 4 * LAYERS + 2 + partial, result.collectives
        assert result.collectives.pop("all_gather/tp") == 1, result.collectives  # the logits
        assert result.collectives.pop("all_gather/control") == 1, result.collectives  # the guard
        replicas = 4 if model_type not in ("qwen2",) else 6  # k and v weights (and biases) of two layers
        if tp == 4 and model_type != "gpt2":
            assert result.collectives.pop("all_reduce/replicas") >= replicas, result.collectives
        assert result.collectives == {}, "an unexpected collective"


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str, tp: int) -> None:
    model_type, overrides = SHAPES[name]
    assert_parity(run(tp, parity, model_type, overrides, tp))


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart", "mbart"])
def test_encoder_decoder(model_type: str) -> None:
    """Each layer's cross-attention enters the encoder's states once more."""
    results = run(2, parity, model_type, {}, 2)
    assert_parity(results)
    for result in results:
        # encoder: attention and MLP; decoder: two attentions, of which one has two inputs, and MLP; two embeddings
        expected = 4 * LAYERS + 7 * LAYERS + 2 + 1
        assert result.collectives.pop("all_reduce/tp") == expected, result.collectives


@pytest.mark.parametrize("model_type", ZOO)
def test_zoo(model_type: str) -> None:
    tp = 2
    results = run(tp, parity, model_type, {}, tp)
    assert_parity(results)
    for result in results:
        norms = {"olmo2": 4 * LAYERS}.get(model_type, 0)  # a statistic, forward and backward, of q and of k
        # gradients of q/k norms; of the one key and value that both ranks hold (weight and bias)
        sums = {"exaone4": 2, "phi": 4, "persimmon": 4, "gpt_bigcode": 2, "falcon": 2}.get(model_type, 0)
        expected = (4 + sums) * LAYERS + 2 + norms
        assert result.collectives.pop("all_reduce/tp") == expected, result.collectives
        assert result.collectives.pop("all_gather/tp") == 1, result.collectives
        assert result.collectives.pop("all_gather/control") == 1, result.collectives
        result.collectives.pop("all_reduce/replicas", None)
        assert result.collectives == {}, "an unexpected collective"
