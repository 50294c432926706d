"""A script's own ``forward`` around a sharded model, as a subclass of it or inside of it sees whole weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from torch import nn
from transformers import LlamaForCausalLM
from workers import run, sees_whole


def penalty(model: Any) -> Any:
    """A norm, a product, rows and a mean over a matrix of which each rank has a part."""
    emb, keys = model.get_input_embeddings().weight, model.model.layers[0].self_attn.k_proj.weight
    return 1e-2 * emb.norm() + (keys @ keys.T).pow(2).mean() + emb[torch.tensor([3, 40, 77])].pow(2).sum()


class Around(nn.Module):
    """Stands in for the model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        before = penalty(self.model)
        out = self.model(**inputs)
        out.loss = out.loss + before + penalty(self.model)
        return out


class Subclass(LlamaForCausalLM):
    """Is the model."""

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        before = penalty(self)
        out = super().forward(**inputs)
        out.loss = out.loss + before + penalty(self)
        return out


class Centred(nn.Module):
    """Stands in the model, and has the embedding, too."""

    def __init__(self, norm: nn.Module, embedding: nn.Module):
        super().__init__()
        self.norm, self.embeddings = norm, [embedding]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Any) -> Any:
        return self.norm(hidden) * self.scale - self.embeddings[0].weight.mean(0)


def around(config: Any) -> Any:
    return Around(build(config).train())


def subclass(config: Any) -> Any:
    plain = build(config)
    model = Subclass(config)
    model.load_state_dict(plain.state_dict())
    return model.train()


def inside(config: Any) -> Any:
    model = build(config).train()
    model.model.norm = Centred(model.model.norm, model.model.embed_tokens)
    return model


MAKERS = {"around": around, "subclass": subclass, "inside": inside}


def numbers(model: Any, called: Any = None) -> dict[str, Any]:
    """The loss and the gradients of a step, and the weights after it."""
    loss = (model if called is None else called)(**batch(97, 0)).loss
    loss.backward()
    found = {"loss": loss.item()}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name] = grad.norm().item()
    return found


def models(kind: str) -> tuple[Any, Any]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    whole = MAKERS[kind](config_for("llama", num_key_value_heads=1))
    return whole, tp_plugin.parallelize(MAKERS[kind](config_for("llama", num_key_value_heads=1)), tp_size=2)


@sees_whole
def eager(kind: str) -> Any:
    whole, model = models(kind)
    return numbers(whole), numbers(model)


@pytest.mark.parametrize("kind", MAKERS)
def test_eager(kind: str) -> None:
    for plain, here in run(2, eager, kind):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


@sees_whole
def compiled(kind: str, backend: str) -> Any:
    whole, model = models(kind)
    torch._dynamo.reset()
    return numbers(whole), numbers(model, torch.compile(model, backend=backend))


@pytest.mark.parametrize("kind", MAKERS)
def test_compiled(kind: str) -> None:
    for plain, here in run(2, compiled, kind, "aot_eager"):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


@sees_whole
def ddp(kind: str) -> Any:
    whole, model = models(kind)
    return numbers(whole), numbers(model, torch.nn.parallel.DistributedDataParallel(model))


@pytest.mark.parametrize("kind", MAKERS)
def test_ddp(kind: str) -> None:
    for plain, here in run(4, ddp, kind):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)
