"""Hooks that a script puts on modules, before or after ``prepare``, get and give what one process has there."""

from __future__ import annotations

import copy
import functools
import json
import os
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from workers import run, sees_whole

from tp_plugin.config.keys import ENV_OPTIONS

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "act_fn", "self_attn", "mlp")
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama, one key head": ("llama", {"num_key_value_heads": 1}, LLAMA),
    "llama, three heads": (
        "llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 16}, LLAMA,
    ),
    "gpt2": ("gpt2", {}, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.act", "mlp.c_proj", "attn", "mlp", "ln_1")),
    "parallel residual": ("gpt_neox", {}, ("key_value", "on.dense", "dense_h_to_4h", "dense_4h_to_h", "mlp")),
}  # fmt: skip


class Watch:
    """A script that looks at activations and their gradients, changes some, and adds a penalty of others."""

    def __init__(self, model: Any, parts: tuple[str, ...]):
        self.seen: dict[str, float] = {}
        self.kept: list[torch.Tensor] = []
        others = (
            "embed_tokens",
            "wte",
            "embed_in",
            "lm_head",
            "embed_out",
            "input_layernorm",
            "layers.1",
            "h.1",
            "norm",
        )
        for path, module in model.named_modules():
            name = path.split(".", path.count(".") - 1)[-1] if "." in path else path
            if any(path.endswith(part) for part in (*parts, *others)):
                module.register_forward_pre_hook(functools.partial(self.before, path), with_kwargs=True)
                module.register_forward_hook(functools.partial(self.after, path, name))
                if not path.endswith(("lm_head", "embed_out")):
                    module.register_full_backward_hook(functools.partial(self.backward, path))

    def note(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
            self.seen[name] = (value.detach().double() * weights).sum().item() / value.numel() ** 0.5
            self.seen[f"{name} norm"] = value.detach().double().norm().item()

    def before(self, path: str, module: Any, args: Any, kwargs: Any) -> Any:
        for at, value in enumerate((*args, *kwargs.values())):
            self.note(f"{path} argument {at}", value)
        if path.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h", "q_proj")):
            return (args[0] * torch.linspace(0.9, 1.1, args[0].shape[-1]), *args[1:]), kwargs
        return None

    def after(self, path: str, name: str, module: Any, args: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        for at, value in enumerate(args):
            self.note(f"{path} taken {at}", value)
        for at, value in enumerate((first, *rest)):
            if not path.endswith(("lm_head", "embed_out")):
                self.note(f"{path} output {at}", value)
        if not torch.is_grad_enabled() or not isinstance(first, torch.Tensor) or "lm_head" in path:
            return None
        self.seen[f"{path} weight"] = sum(p.norm().item() for p in module.parameters(recurse=False))
        if path.endswith(("up_proj", "c_fc", "dense_h_to_4h")):
            self.kept.append(args[0])
            first[..., 10] = 0
            return None
        first.register_hook(functools.partial(self.note, f"{path} gradient"))
        if path.endswith(("act_fn", "mlp.act", "q_proj", "c_attn")):
            self.kept.append(first)  # for a penalty
        if path.endswith(("k_proj", "query_key_value")):
            return first * torch.linspace(1.1, 0.9, first.shape[-1])
        return None

    def backward(self, path: str, module: Any, grad_input: Any, grad_output: Any) -> Any:
        for kind, grads in {"in": grad_input, "out": grad_output}.items():
            for at, grad in enumerate(grads):
                self.note(f"{path} grad_{kind} {at}", grad)
        if path.endswith(("o_proj", "v_proj", "mlp")) and grad_input[0] is not None:
            return tuple(None if grad is None else grad * 1.25 for grad in grad_input)
        return None


@sees_whole
def hooked_case(name: str, when: str, sequence: bool) -> dict[str, Any]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    model_type, overrides, parts = CASES[name]
    stop()
    os.environ[ENV_OPTIONS] = json.dumps({"sequence_parallel": sequence})
    torch_utils.install()
    found: dict[str, Any] = {"seen": [], "losses": [], "grads": []}
    for sharded in (False, True):
        settings = config_for(model_type, **overrides)
        settings._attn_implementation = "eager"
        model = build(settings).train()
        watch = Watch(model, parts) if when == "before" or not sharded else None
        if sharded:
            tp_plugin.parallelize(model, tp_size=2)
        watch = watch or Watch(model, parts)
        loss = model(**batch(97, 0)).loss
        total = loss + 0.1 * sum(kept.pow(2).mean() for kept in watch.kept)
        total.backward()
        found["seen"].append(watch.seen)
        found["losses"].append([loss.item(), total.item()])
        found["grads"].append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, whole = found.pop("grads")
    found["apart"] = {
        name: (torch.as_tensor(whole[name].numpy()) - grad).norm().item() / grad.norm().item()
        for name, grad in plain.items()
        if grad.norm() > 1e-6
    }
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_hooks_see_and_change_what_one_process_has(name: str, when: str) -> None:
    check(name, when, False)


@pytest.mark.parametrize("name", ["llama, one key head", "gpt2"])
def test_under_sequence_parallelism(name: str) -> None:
    check(name, "after", True)


def check(name: str, when: str, sequence: bool) -> None:
    for found in run(2, hooked_case, name, when, sequence):
        plain, here = found["seen"]
        assert len(plain) > 100 and plain.keys() == here.keys(), plain.keys() ^ here.keys()
        wrong = {
            key: (plain[key], here[key]) for key in plain if here[key] != pytest.approx(plain[key], rel=1e-4, abs=1e-6)
        }
        assert not wrong, wrong
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
        assert max(found["apart"].values()) < 1e-4, found["apart"]


@sees_whole
def refused_case() -> list[str]:
    """Hooks where it is not known what a rank has; and in a graph."""
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    settings = config_for("gpt2")
    settings._attn_implementation = "eager"
    plain, messages = build(settings).train(), []
    model = tp_plugin.parallelize(copy.deepcopy(plain), tp_size=2)
    handle = model.transformer.h[0].attn.resid_dropout.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(TPError) as raised:
        model(**batch(97, 0))
    messages.append(str(raised.value))
    handle.remove()
    losses = []
    for one in (plain, model):
        one.transformer.h[0].mlp.act.register_forward_hook(
            lambda module, args, output: output * (output > output.mean())
        )
        copied = copy.deepcopy(one)
        losses.append(copied(**batch(97, 0)).loss.item())
        torch._dynamo.reset()
        losses.append(torch.compile(copied, backend="aot_eager")(**batch(97, 0)).loss.item())
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)
    return messages


def test_what_is_not_known_is_refused() -> None:
    for (message,) in run(2, refused_case):
        assert "'transformer.h.0.attn.resid_dropout', inside of the block 'transformer.h.0.attn'" in message
