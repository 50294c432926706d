"""Embeddings split over the ranks: ids that one process refuses, and padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import build, config_for
from torch import nn
from workers import run
from zoo import fresh


def raised_by(model: nn.Module, ids: torch.Tensor) -> tuple[str, str]:
    try:
        model(input_ids=ids)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def outside_case(wrong: int, training: bool, kind: str) -> dict[str, Any]:
    """Run on every rank: an id outside of the vocabulary, and then a good batch."""
    import tp_plugin

    fresh()
    plain = build(config_for("llama")).train(training)
    if kind == "adapted":
        import peft

        plain = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    sharded = tp_plugin.parallelize(copy.deepcopy(plain), tp_size=2)
    good = torch.tensor([[3, 0, plain.config.vocab_size - 1, 7]])
    bad = good.clone()
    bad[0, 2] = wrong if wrong < 0 else plain.config.vocab_size + wrong
    with torch.set_grad_enabled(training):
        errors = [raised_by(model, bad) for model in (plain, sharded)]
        logits = [model(input_ids=good).logits for model in (plain, sharded)]
    return {"errors": errors, "apart": (logits[0] - logits[1]).abs().max().item()}


@pytest.mark.parametrize("kind", ["plain", "adapted"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("wrong", [0, 44, -1])
def test_ids_outside_the_vocabulary(wrong: int, training: bool, kind: str) -> None:
    for found in run(2, outside_case, wrong, training, kind):
        expected, got = found["errors"]
        assert got == expected == ("IndexError", "index out of range in self")
        assert found["apart"] <= 1e-5


def rows_case(size: int, tp: int, padding: int | None) -> list[float]:
    """Outputs and gradients of an embedding whose rows are split, the last rank's padded or empty."""
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.runtime.start import start, stop
    from tp_plugin.tensor.embedding import ParallelEmbeddingForward, VocabularyRows

    stop()
    group = start(RunConfig(tp)).mesh.tp
    torch.manual_seed(0)
    whole = nn.Embedding(size, 6, padding_idx=padding)
    width = -(-size // tp)
    start, stop = min(group.rank * width, size), min((group.rank + 1) * width, size)
    local = nn.Embedding(width, 6)
    local.padding_idx = padding
    with torch.no_grad():
        local.weight[: stop - start] = whole.weight[start:stop]
    ParallelEmbeddingForward.install(local, VocabularyRows(size, start, stop, padding, group))
    ids = torch.cat([torch.arange(size), torch.tensor([0, size - 1])]).view(1, -1)
    factors = torch.randn(1, size + 2, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for embedding in (whole, local):
        output = embedding(ids)
        (output * factors).sum().backward()
        found.append(output)
    for wrong in (size, size + 3, -1):
        with pytest.raises(IndexError, match="index out of range in self"):
            local(torch.tensor([wrong]))
        assert local.padding_idx == padding
    apart = local.weight.grad[: stop - start] - whole.weight.grad[start:stop]
    return [(found[0] - found[1]).abs().max().item(), apart.abs().max().item() if apart.numel() else 0.0]


# of 97 rows on four ranks the last has 22 and padding, of 5 none; padding_idx on the first rank and on the last
@pytest.mark.parametrize("size, padding", [(97, None), (97, 0), (97, 96), (5, 4), (5, 1)])
def test_rows(size: int, padding: int | None) -> None:
    for found in run(4, rows_case, size, 4, padding):
        assert max(found) <= 1e-6, found
