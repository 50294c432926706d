"""Options of the plugin and torch.compile under Accelerate's DDP: the numbers of plain DDP at the same dp."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
import torch
from models import adapted, batch, build, config_for
from test_save_state import accelerated
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from workers import run

from tp_plugin.config.keys import ENV_OPTIONS

STEPS, MICRO, CLIP = 3, 2, 0.01
LLAMA = {"tie_word_embeddings": False, "use_cache": False}


def train(tp: int, model_type: str, overrides: dict[str, Any], options: dict[str, Any], how: str) -> dict[str, Any]:
    """What this rank saw, and its weights; ``how`` it is compiled: by Accelerate, or before or after ``prepare``."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options, adapter = dict(options), options.get("adapter")
    options.pop("adapter", None)

    def make() -> Any:
        model = build(config_for(model_type, **overrides))
        return (adapted(model, adapter) if adapter else model).train()

    if tp == 1:
        return _train(tp, make(), None, how if how == "hook" else "")
    os.environ[ENV_OPTIONS] = json.dumps(options)
    try:
        with accelerated(tp):
            from accelerate import Accelerator
            from accelerate.utils import TorchDynamoPlugin

            plugin = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=how == "regions")
            given = {"dynamo_plugin": plugin} if how in ("accelerate", "regions") else {}
            accelerator = Accelerator(gradient_accumulation_steps=MICRO, **given)
            model = make()
            if how == "before":
                model = torch.compile(model, backend="aot_eager")
            return _train(tp, model, accelerator, how)
    finally:
        del os.environ[ENV_OPTIONS]


def _train(tp: int, model: Any, accelerator: Any, how: str) -> dict[str, Any]:
    from tp_plugin.shard.params import plain_name
    from tp_plugin.tensor.param_entry import layout_of

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    vocabulary = model.config.vocab_size
    if accelerator is None:
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        if how == "after":
            model = torch.compile(model, backend="aot_eager")
    if how == "hook":
        model.register_comm_hook(None, default_hooks.allreduce_hook)
        how = ""
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(MICRO):
            data = batch(vocabulary, 100 * step + 10 * micro + torch.distributed.get_rank() // tp)
            if accelerator is None:
                loss = model(**data).loss
                (loss / MICRO).backward()
            else:
                with accelerator.accumulate(model):
                    loss = model(**data).loss
                    accelerator.backward(loss)
            losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == bool(how), "compiled, or not"
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
        "layouts": {name: layout_of(parameter) for name, parameter in named.items()},
    }


CASES = {
    "sequence": ("llama", LLAMA, {"sequence_parallel": True}, ""),
    "experts": ("mixtral", {}, {"expert_parallel": True}, ""),
    "overlap": ("llama", {**LLAMA, "attention_bias": False, "mlp_bias": False}, {"overlap": True, "fuse": True}, ""),
    "communication hook": ("llama", LLAMA, {}, "hook"),
    "fused head": ("llama", {}, {"fused_head": True}, ""),
    "prefix": ("llama", {"num_key_value_heads": 1}, {"adapter": "prefix"}, ""),
    "dora": ("llama", {"num_key_value_heads": 1}, {"adapter": "dora"}, ""),
    "hira": ("llama", {"num_key_value_heads": 1}, {"adapter": "HiRA"}, ""),
    "compiled by accelerate": ("llama", LLAMA, {}, "accelerate"),
    "compiled by regions": ("llama", LLAMA, {}, "regions"),
    "compiled before": ("llama", LLAMA, {}, "before"),
    "compiled after": ("llama", LLAMA, {}, "after"),
}


USUAL = ("sequence", "communication hook", "fused head")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in CASES])
def test_numbers_of_plain_ddp(name: str) -> None:
    model_type, overrides, options, how = CASES[name]
    expected = run(2, train, 1, model_type, overrides, options, how)
    for rank, found in enumerate(run(4, train, 2, model_type, overrides, options, how)):
        want = expected[rank // 2]
        assert found["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(want["norms"], rel=1e-5)
        assert max(want["norms"]) > CLIP, "clipping was never active"
        assert found["weights"].keys() == want["weights"].keys()
        for key, tensor in found["weights"].items():
            layout, whole = found["layouts"][key], want["weights"][key]
            local = layout.shard(whole, rank % 2) if layout is not None else whole
            torch.testing.assert_close(tensor, local, rtol=0, atol=3e-4, msg=lambda text, key=key: f"{key}: {text}")


def by_hand_case(tp: int) -> list[float]:
    """A script without Accelerate: ``parallelize``, then torch's own wrapper."""
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    model = build(config_for("llama", **LLAMA)).train()
    if tp > 1:
        model = tp_plugin.parallelize(model, tp_size=tp)
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    seen = []
    for step in range(3):
        loss = model(**batch(97, 10 * step + torch.distributed.get_rank() // tp)).loss
        loss.backward()
        seen += [loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("dp", [1, 2])
def test_a_model_that_a_script_wraps_itself(dp: int) -> None:
    expected = run(dp, by_hand_case, 1)
    for rank, seen in enumerate(run(2 * dp, by_hand_case, 2)):
        assert seen == pytest.approx(expected[rank // 2], rel=1e-5)


def hooks_case() -> list[str]:
    """What is said of hooks that may average shards of different weights."""
    from tp_plugin.errors import TPError

    def own(state: Any, bucket: torch.distributed.GradBucket) -> Any:
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()

    with accelerated(2):
        from accelerate import Accelerator

        model = Accelerator().prepare(build(config_for("llama", **LLAMA)))
        found = []
        state = powerSGD_hook.PowerSGDState(None)
        for given, hook in ((state, powerSGD_hook.powerSGD_hook), (None, own)):
            with pytest.raises(TPError) as raised:
                model.register_comm_hook(given, hook)
            found.append(str(raised.value))
        return found


def test_other_communication_hooks_are_refused() -> None:
    for power, own in run(4, hooks_case):
        assert power.startswith("the DDP communication hook powerSGD_hook is incompatible with tp_size")
        assert "hooks_case.<locals>.own is incompatible with tp_size" in own


def beside_case(tp: int) -> list[float]:
    """A distiller's projection, which is prepared beside (and before) its model, and stays whole."""
    torch.manual_seed(0)
    model = build(config_for("llama", **LLAMA)).train()
    project = torch.nn.Linear(48, 5)
    optimizer = torch.optim.AdamW([*project.parameters(), *model.parameters()], lr=1e-3, eps=1e-6)
    with accelerated(tp) if tp > 1 else contextlib.nullcontext():
        if tp > 1:
            from accelerate import Accelerator

            project.weight.data += torch.distributed.get_rank()  # the leader's counts
            project, model, optimizer = Accelerator().prepare(project, model, optimizer)
            assert project.weight.shape == (5, 48)
        seen = []
        for step in range(3):
            states = model(**batch(97, step), output_hidden_states=True).hidden_states[-1]
            loss = project(states).pow(2).mean()
            loss.backward()
            both = [*project.parameters(), *model.parameters()]
            seen += [loss.item(), torch.nn.utils.clip_grad_norm_(both, 0.1).item()]
            optimizer.step()
            optimizer.zero_grad()
        return [*seen, *project.weight.flatten().tolist()]


def test_a_module_beside_the_model_stays_whole() -> None:
    expected = run(1, beside_case, 1)[0]
    for seen in run(2, beside_case, 2):
        assert seen[:6] == pytest.approx(expected[:6], rel=1e-5)
        assert seen[6:] == pytest.approx(expected[6:], abs=3e-4)
