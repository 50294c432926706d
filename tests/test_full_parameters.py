"""``tp_plugin.full_parameters``: what a script reads and writes in the block is that of a plain run, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from torch import nn
from workers import run

from tp_plugin.config.keys import ENV_OPTIONS


def edit(model: Any) -> dict[str, float]:
    """What scripts do to weights: rows, columns and single elements by index, random fills, whole-tensor arithmetic."""
    seen: dict[str, float] = {}
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[3] = 0
        embedding[-9:] = embedding[:-9].mean(0)
        seen["nearest"] = float((embedding[5] @ embedding.T).argmax())
        for number, (name, parameter) in enumerate(model.named_parameters()):
            seen[name] = parameter.norm().item()
            assert parameter.numel() == parameter.shape.numel()
            if parameter.dim() == 2:
                parameter[1, 2] += 0.5
                parameter[:, 4] *= 2
                parameter[parameter.shape[0] // 2 + 1] = 0.25
            if number % 5 == 0:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
            elif parameter.dim() == 1:
                parameter.sub_(parameter.mean())
    return seen


def apart(model: Any, whole: Any, gather: Any = contextlib.nullcontext, by: float = 0.0) -> list[str]:
    """Names of parameters of which this rank does not hold its shard of the plain model's."""
    from tp_plugin.mesh.dtensor_utils import all_rows
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.param_entry import layout_of

    want, wrong = dict(whole.named_parameters()), []
    with gather():
        for name, parameter in model.named_parameters():
            layout: Any = layout_of(parameter)
            shard = layout.shard(want[name].detach(), require().mesh.tp.rank)
            if not torch.allclose(all_rows(parameter.detach()).float(), shard.float(), rtol=0.0, atol=by):
                wrong.append(name)
    return wrong


def plain_case(model_type: str, overrides: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Two steps with an edit between, and what is saved at the end."""
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    os.environ[ENV_OPTIONS] = json.dumps(options)
    whole = build(config_for(model_type, **overrides)).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    os.environ.pop(ENV_OPTIONS)
    found: dict[str, Any] = {"losses": []}
    kept = {id(p) for p in sharded.parameters()}
    before: dict[str, torch.Tensor] = {}
    alive = sharded.state_dict()  # a save before the edit must not be what a save after it gives
    for model in (whole, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        losses = []
        for seed in range(3):
            loss = model(**batch(97, seed)).loss
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if model is sharded:  # the same weights on both sides: the edit is compared to the last bit
            model.load_state_dict(before)
        else:
            before = {name: value.clone() for name, value in model.state_dict().items()}
        with tp_plugin.full_parameters(model, write=True):
            seen = edit(model)
        found["seen" if model is whole else "seen here"] = seen
        found["losses"].append([*losses, model(**batch(97, 9)).loss.item()])
    found["apart"] = apart(sharded, whole)
    found["kept"] = kept == {id(p) for p in sharded.parameters()}
    saved, plain = sharded.state_dict(), whole.state_dict()
    found["saved"] = [name for name, value in saved.items() if not torch.equal(value, plain[name])]
    del alive
    return found


CASES: list[Any] = [
    ("llama", {}, {}),
    ("gpt2", {}, {}),
    ("llama", {"num_key_value_heads": 2}, {"fuse": True}),
    ("mixtral", {}, {"expert_parallel": True}),
    ("gpt_neox", {}, {"sequence_parallel": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[2]]))
def test_edits_are_those_of_a_plain_run(case: Any) -> None:
    for found in run(2, plain_case, *case):
        assert found["apart"] == [] and found["saved"] == [] and found["kept"]
        assert found["seen here"] == pytest.approx(found["seen"], rel=1e-6)
        for plain, here in zip(*found["losses"], strict=True):
            assert here == pytest.approx(plain, rel=1e-5)


def gradients_case(model_type: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Gradients in the block: read, written, taken away, and what a step makes of them."""
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    whole = build(config_for(model_type, **overrides)).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    found: dict[str, Any] = {"norms": []}
    for model in (whole, sharded):
        model(**batch(97, 0)).loss.backward()
        memory = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
        with tp_plugin.full_parameters(model):
            found["norms"].append([p.grad.norm().item() for p in model.parameters()])
        with tp_plugin.full_parameters(model, write=True):
            model.get_input_embeddings().weight.grad[3] = 1.0
            for number, p in enumerate(model.parameters()):
                p.grad = None if number == 2 else p.grad
                if number == 4:
                    p.grad = torch.ones_like(p)
        found["same memory"] = all(
            p.grad.data_ptr() == memory[name]
            for number, (name, p) in enumerate(model.named_parameters())
            if number not in (2, 4)
        )
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    found["apart"] = apart(sharded, whole, by=1e-6)  # gradients of backward passes, added in another order
    with pytest.raises(TPError, match="written to inside"), tp_plugin.full_parameters(sharded.get_input_embeddings()):
        sharded.get_input_embeddings().weight.grad.zero_()
    return found


@pytest.mark.parametrize("case", [("llama", {"num_key_value_heads": 1}), ("gpt2", {})], ids=lambda case: case[0])
def test_gradients_are_whole_in_the_block(case: Any) -> None:
    for found in run(2, gradients_case, *case):
        plain, here = found["norms"]
        assert here == pytest.approx(plain, rel=1e-4, abs=1e-6) and found["same memory"]
        assert found["apart"] == []


def refusals_case() -> dict[str, str]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    sharded: Any = tp_plugin.parallelize(build(config_for("llama")), tp_size=2)
    before = {name: p.detach().clone() for name, p in sharded.named_parameters()}
    found = {}
    with pytest.raises(TPError) as raised, tp_plugin.full_parameters(sharded), torch.no_grad():
        sharded.lm_head.weight[3] = 0
    found["read only"] = str(raised.value)
    with pytest.raises(TPError) as raised, tp_plugin.full_parameters(sharded.model.layers[1]):
        sharded(**batch(97, 0))
    found["called"] = str(raised.value)
    with pytest.raises(ZeroDivisionError), tp_plugin.full_parameters(sharded, write=True), torch.no_grad():
        sharded.lm_head.weight.zero_()
        raise ZeroDivisionError
    assert all(torch.equal(before[name], p) for name, p in sharded.named_parameters())
    assert sharded(**batch(97, 0)).loss.isfinite()
    # written differently by each rank: the first one's
    with tp_plugin.full_parameters(sharded.lm_head, write=True), torch.no_grad():
        sharded.lm_head.weight.fill_(1.0 + torch.distributed.get_rank())
    assert (sharded.state_dict()["lm_head.weight"] == 1).all()
    return found


def test_the_unhappy_paths() -> None:
    for found in run(2, refusals_case):
        assert "'lm_head.weight' was written to" in found["read only"] and "write=True" in found["read only"]
        assert "parameter 'model.layers.1." in found["called"] and "is whole" in found["called"]


def test_without_a_run_parameters_are_what_they_are() -> None:
    import tp_plugin

    model = build(config_for("llama"))
    with tp_plugin.full_parameters(model, write=True):
        edit(model)


def fsdp2_case() -> dict[str, Any]:
    import test_fsdp2

    import tp_plugin

    sharded, config = test_fsdp2.make(2, "llama", {})
    whole = build(config)
    kept = {id(p) for p in sharded.parameters()}
    found = {"plain": edit(whole)}
    with tp_plugin.full_parameters(sharded, write=True):
        found["here"] = edit(sharded)
    found["apart"] = apart(sharded, whole)
    found["kept"] = kept == {id(p) for p in sharded.parameters()}
    optimizer = test_fsdp2.new_optimizer(sharded)
    found["loss"] = test_fsdp2.step(sharded, optimizer, 97, 2, 1, True)["losses"][0]
    dp_rank = torch.distributed.get_rank() // 2
    found["plain loss"] = whole(**batch(97, seed=100 + dp_rank)).loss.item()
    return found


def test_fsdp2() -> None:
    for found in run(4, fsdp2_case):
        assert found["apart"] == [] and found["kept"]
        assert found["here"] == pytest.approx(found["plain"], rel=1e-6)
        assert found["loss"] == pytest.approx(found["plain loss"], rel=1e-5)


def zero_case(stage: int, bf16: bool) -> dict[str, Any]:
    """An edit before a step whose learning rate is 0: DeepSpeed's fp32 copies write the weights anew."""
    import deepspeed
    from test_zero import ds_config, plain_again

    import tp_plugin

    plain_again()
    config = config_for("llama")
    dtype = torch.bfloat16 if bf16 else torch.float32
    whole = build(config).to(dtype)
    model = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    settings = ds_config(stage, **({"bf16": {"enabled": True}} if bf16 else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step() -> None:
        for _ in range(2):
            engine.backward(engine(**batch(97, 1)).loss)
            engine.step()

    def gather() -> Any:
        if stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(list(model.parameters()))

    step()
    found = {"plain": edit(whole)}
    with tp_plugin.full_parameters(engine, write=True):
        found["here"] = edit(model)
    found["apart"] = apart(model, whole, gather)
    step()
    found["apart after a step"] = apart(model, whole, gather)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage, bf16", [(1, False), (2, True), (3, False), (3, True)])
def test_zero(stage: int, bf16: bool) -> None:
    for found in run(4, zero_case, stage, bf16):
        assert found["apart"] == [] and found["apart after a step"] == []
        assert found["here"] == pytest.approx(found["plain"], rel=1e-6)
