"""A script's own ``forward`` around a sharded model, as a subclass of it or inside of it sees whole weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from habits import base
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
        if out.loss is not None:  # not in generate
            out.loss = out.loss + before + penalty(self)
        return out


class Centred(nn.Module):
    """Stands in the model, and has the embedding, too."""

    def __init__(self, norm: nn.Module, embedding: nn.Module):
        super().__init__()
        self.norm, self.embeddings = norm, [embedding]
        self.scale = nn.Parameter(torch.ones(1))

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
    for plain, here in run(2, compiled, kind, "eager"):  # the tracer is what is tested
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


@sees_whole
def ddp(kind: str) -> Any:
    whole, model = models(kind)
    return numbers(whole), numbers(model, torch.nn.parallel.DistributedDataParallel(model))


@pytest.mark.parametrize("kind", MAKERS)
def test_ddp(kind: str) -> None:
    for plain, here in run(4, ddp, kind):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


@sees_whole
def fsdp2(kind: str) -> Any:
    import test_fsdp2

    test_fsdp2._install()
    whole, model = models(kind)
    inner = model.model if kind == "around" else model
    for layer in inner.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
    return numbers(whole), numbers(model)


@pytest.mark.parametrize("kind", MAKERS)
def test_fsdp2(kind: str) -> None:
    for plain, here in run(4, fsdp2, kind):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


@sees_whole
def zero(kind: str, stage: int) -> Any:
    import deepspeed
    import test_zero

    test_zero.plain_again()
    whole, model = models(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = test_zero.ds_config(stage, gradient_accumulation_steps=1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loss = engine(**batch(97, 0)).loss
    engine.backward(loss)
    read = deepspeed.utils.safe_get_full_grad  # patched by now
    found = {"loss": loss.item()} | {name: read(p).norm().item() for name, p in model.named_parameters()}
    engine.destroy()
    return numbers(whole), found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_zero(kind: str, stage: int) -> None:
    for plain, here in run(4, zero, kind, stage):
        assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


class Learned(nn.Module):
    """Uses weights of its own, by a helper of its own, and a child's output: nothing that is split."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.gate = nn.Linear(width, width)
        self.eps, self.names = 1e-6, ["a", "b"]

    def forward(self, hidden: Any) -> Any:
        return self.scaled(hidden) + 1e-3 * self.gate(hidden).tanh()

    def scaled(self, hidden: Any) -> Any:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def rows_of(module: Any) -> Any:
    return module.embeddings[0].weight


class ByHelper(Learned):
    """Its own method's helper reads a weight that is split."""

    def __init__(self, width: int, embedding: Any):
        super().__init__(width)
        self.embeddings = [embedding]

    def scaled(self, hidden: Any) -> Any:
        return super().scaled(hidden) - rows_of(self).mean(0)


class ByList(Learned):
    """It holds a weight in a list, and names none."""

    def __init__(self, width: int, embedding: Any):
        super().__init__(width)
        self.watched = [embedding.weight]

    def forward(self, hidden: Any) -> Any:
        return super().forward(hidden) - sum(p.mean(0) for p in self.watched)


class Helper:
    def __init__(self, embedding: Any):
        self.embedding = embedding

    def shift(self) -> Any:
        return self.embedding.weight.mean(0)


class ByObject(Learned):
    """It has a helper that is no module."""

    def __init__(self, width: int, embedding: Any):
        super().__init__(width)
        self.helper = Helper(embedding)

    def forward(self, hidden: Any) -> Any:
        return super().forward(hidden) - self.helper.shift()


class ByAnotherFile(Learned):
    """It calls a function of another file."""

    def __init__(self, width: int, embedding: Any):
        super().__init__(width)
        self.embeddings = [embedding]

    def forward(self, hidden: Any) -> Any:
        return super().forward(hidden) - base.embedding(self).mean(0)

    def get_input_embeddings(self) -> Any:
        return self.embeddings[0]


@sees_whole
def norms_of_ones_own() -> dict[str, Any]:
    """Modules in the place of the last norm: which of them are the script's region, and what they compute."""
    from tp_plugin.tensor.global_view import Calls
    from tp_plugin.tensor.global_view.region import OwnForward

    found: dict[str, Any] = {}
    config = config_for("llama", num_key_value_heads=1)

    def made(kind: Any) -> Any:
        model = build(config).train()
        args = () if kind is Learned else (model.model.embed_tokens,)
        torch.manual_seed(1)
        model.model.norm = kind(48, *args)
        return model

    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    for kind in (Learned, ByHelper, ByList, ByObject, ByAnotherFile):
        whole, model = made(kind), tp_plugin.parallelize(made(kind), tp_size=2)
        hooks = list(model.model.norm._forward_pre_hooks.values())
        before = Calls.count
        model(**batch(97, 0)).loss.backward()
        model.zero_grad()
        dispatched = Calls.count - before
        found[kind.__name__] = {
            "region": any(isinstance(getattr(hook, "__self__", None), OwnForward) for hook in hooks),
            "dispatched": dispatched,
            "numbers": (numbers(whole), numbers(model)),
        }
    return found


def test_only_forwards_that_may_read_what_is_split_are_the_scripts_region() -> None:
    for found in run(2, norms_of_ones_own):
        assert {name for name, one in found.items() if one["region"]} == set(found) - {"Learned"}
        assert found["Learned"]["dispatched"] == 0
        for one in found.values():
            assert one["numbers"][1] == pytest.approx(one["numbers"][0], rel=2e-5, abs=1e-7)


@sees_whole
def in_every_way() -> dict[str, Any]:
    """A subclass in ``generate``, in the main process's evaluation, with layers that are recomputed, and copied."""
    import copy

    whole, model = models("subclass")
    found: dict[str, Any] = {}
    ids = batch(97, 0)["input_ids"]
    for one in (whole, model):
        one.eval()
        found.setdefault("generated", []).append(one.generate(ids, max_new_tokens=5, do_sample=False).tolist())
    if torch.distributed.get_rank() == 0:
        with torch.no_grad():
            found["alone"] = whole(**batch(97, 0)).loss.item(), model(**batch(97, 0)).loss.item()
    for one in (whole, model):
        one.train()
        one.gradient_checkpointing_enable()
    found["recomputed"] = numbers(whole), numbers(model)
    copied = copy.deepcopy(model)
    for one in (whole, copied):
        one.zero_grad()
    found["copied"] = numbers(whole), numbers(copied)
    return found


def test_in_every_way() -> None:
    for found in run(2, in_every_way):
        assert found["generated"][0] == found["generated"][1]
        for plain, here in [found[name] for name in ("alone", "recomputed", "copied") if name in found]:
            assert here == pytest.approx(plain, rel=2e-5, abs=1e-7)


class Kept(LlamaForCausalLM):
    """Fails in its own lines, once."""

    fails = False

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        out = super().forward(**inputs)
        if self.fails:
            raise ValueError(f"of the script's, {self.lm_head.weight.shape}")
        return out


@sees_whole
def after_an_error() -> list[Any]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    model = tp_plugin.parallelize(Kept(config_for("llama")), tp_size=2)
    model.fails = True
    with pytest.raises(ValueError, match="of the script's"):
        model(**batch(97, 0))
    model.fails = False
    shape = tuple(model.lm_head.weight.shape)
    model(**batch(97, 0)).loss.backward()
    return [shape, require().region.is_script, tuple(model.lm_head.weight.grad.shape)]


def test_after_an_error_in_it_weights_look_whole() -> None:
    for shape, is_script, gradient in run(2, after_an_error):
        assert shape == gradient == (97, 48) and is_script
