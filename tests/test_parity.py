"""Every architecture against one process: loss, every gradient, norm, clipped AdamW steps, weights, collectives."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, build, config_for
from workers import run

FAMILY = [
    "llama", "mistral", "ministral", "qwen2", "gemma", "granite", "smollm3", "olmo", "helium", "seed_oss",
    "gemma2", "gemma3_text", "qwen3", "arcee", "starcoder2", "gpt2",
]  # fmt: skip

ZOO = [
    "stablelm", "ernie4_5", "cohere", "cohere2", "glm", "glm4", "nemotron", "olmo2", "exaone4", "phi", "phi3",
    "gpt_neo", "gptj", "codegen", "gpt_neox", "persimmon", "gpt_bigcode", "opt", "xglm", "biogpt", "bloom", "falcon",
    "mpt",
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


def train(model: Any, vocabulary: int, steps: int) -> dict[str, Any]:
    """Losses, gradients of the first step, gradient norms, and the trained model's tensors."""
    # eps above rounding noise: GPT-2's key bias has no gradient but noise (softmax ignores it), which a tiny eps would
    # blow up to whole steps of any sign, on one process as on many
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6)
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        for micro in range(2):
            loss = model(**batch(vocabulary, seed=10 * step + micro)).loss / 2
            loss.backward()
            seen["losses"].append(loss.item())
        if step == 0:
            seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def parity(model_type: str, overrides: dict[str, Any], tp: int) -> dict[str, Any]:
    """Run on every rank: the largest deviations of the sharded model from a plain one, trained side by side."""
    import tp_plugin
    from tp_plugin.parallel.mesh import forget_mesh, ledger, require_mesh

    forget_mesh()
    random.seed(0)
    np.random.seed(0)  # equal generators: the guard has nothing to synchronise
    torch.use_deterministic_algorithms(True)
    config = config_for(model_type, **overrides)
    whole = build(config)
    sharded = copy.deepcopy(whole)
    tp_plugin.parallelize(sharded, tp_size=tp)
    mesh = require_mesh()
    plan = sharded.tp_record.plan

    def gathered(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return plan.layouts[name].gather(mesh.control.gather_objects(tensor))

    for counter in ledger.values():
        counter.clear()
    sharded(**batch(config.vocab_size, seed=0)).loss.backward()
    counts = dict(ledger["count"])
    sharded.zero_grad()

    expected = train(whole, config.vocab_size, 6)
    found = train(sharded, config.vocab_size, 6)
    deviations = {
        "loss": max(abs(a - b) / abs(a) for a, b in zip(expected["losses"], found["losses"], strict=True)),
        "norm": max(abs(a - b) / a for a, b in zip(expected["norms"], found["norms"], strict=True)),
        "keys": set(expected["grads"]) ^ set(found["grads"]),
    }
    grads = {name: gathered(name, grad) for name, grad in found["grads"].items()}
    # a key's bias has no gradient but rounding noise (softmax ignores it): noise it must stay
    size = torch.stack([grad.norm() for grad in expected["grads"].values()]).norm()
    deviations["grad"] = max(
        ((grads[name] - grad).norm() / (grad.norm() if grad.norm() > 1e-6 * size else 1e-2 * size)).item()
        for name, grad in expected["grads"].items()
    )
    weights = {name: gathered(name, p.detach()) for name, p in sharded.named_parameters()}
    deviations["weight"] = max((weights[name] - p.detach()).abs().max().item() for name, p in whole.named_parameters())
    deviations["moved"] = max(
        (weights[name] - p.detach()).abs().max().item() for name, p in build(config).named_parameters()
    )
    state, plain = sharded.state_dict(), whole.state_dict()
    deviations["state keys"] = list(state) != list(plain)
    deviations["state"] = max((state[k].float() - plain[k].float()).abs().max().item() for k in plain)
    prompt = batch(config.vocab_size, seed=99, size=2, length=4)["input_ids"]
    whole.eval(), sharded.eval()
    limits = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    deviations["tokens"] = whole.generate(prompt, **limits).tolist() != sharded.generate(prompt, **limits).tolist()
    return {"counts": counts, "layers": config.num_hidden_layers, "norms": found["norms"], **deviations}


def assert_parity(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["keys"] == set(), result
        assert result["loss"] <= 1e-5, result
        assert result["grad"] <= 1e-4, result
        assert result["norm"] <= 1e-5, result
        assert result["weight"] <= 3e-4, result
        assert result["moved"] > 1e-3, "the weights did not move: nothing was tested"
        assert result["norms"] == results[0]["norms"], "ranks clip by different norms"
        assert not result["tokens"], "greedy generation differs"
        assert not result["state keys"], "state_dict has other keys, or another order, than the plain model's"
        assert result["state"] <= 3e-4, result


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model_type", FAMILY)
def test_architecture(model_type: str, tp: int) -> None:
    results = run(tp, parity, model_type, {}, tp)
    assert_parity(results)
    for result in results:
        # per layer 2 forward + 2 backward, the embedding's forward, the head's backward; nothing else but q/k norms
        partial = 2 * result["layers"] if model_type in ("qwen3", "gemma3_text") else 0
        assert result["counts"].pop("all_reduce/tp") == 4 * result["layers"] + 2 + partial, result["counts"]
        assert result["counts"].pop("all_gather/tp") == 1, result["counts"]  # the logits
        assert result["counts"].pop("all_gather/control") == 1, result["counts"]  # the guard
        replicas = 4 if model_type not in ("qwen2",) else 6  # k and v weights (and biases) of two layers
        if tp == 4 and model_type != "gpt2":
            assert result["counts"].pop("all_reduce/replicas") >= replicas, result["counts"]
        assert result["counts"] == {}, "an unexpected collective"


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str, tp: int) -> None:
    model_type, overrides = SHAPES[name]
    assert_parity(run(tp, parity, model_type, overrides, tp))


@pytest.mark.parametrize("model_type", ZOO)
def test_zoo(model_type: str) -> None:
    tp = 2
    results = run(tp, parity, model_type, {}, tp)
    assert_parity(results)
    for result in results:
        norms = {"olmo2": 4 * result["layers"]}.get(model_type, 0)  # a statistic, forward and backward, of q and of k
        # gradients of q/k norms; of the one key and value that both ranks hold (weight and bias)
        sums = {"exaone4": 2, "phi": 4, "persimmon": 4, "gpt_bigcode": 2, "falcon": 2}.get(model_type, 0)
        expected = (4 + sums) * result["layers"] + 2 + norms
        assert result["counts"].pop("all_reduce/tp") == expected, result["counts"]
        assert result["counts"].pop("all_gather/tp") == 1, result["counts"]
        assert result["counts"].pop("all_gather/control") == 1, result["counts"]
        result["counts"].pop("all_reduce/replicas", None)
        assert result["counts"] == {}, "an unexpected collective"
