"""Hooks of gradients that a script registers, before ``prepare`` or on a copy, get whole gradients."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from models import batch, build, config_for
from test_region_alone import _models
from workers import run, sees_whole


def _hooked(model: Any) -> dict[str, float]:
    """What hooks of the gradients see, which also change them; some have been taken off again."""
    seen: dict[str, float] = {}

    def halve(name: str, grad: Any) -> Any:
        seen[name] = grad.norm().item()
        grad = grad.clone()
        grad[1] = 0
        return grad

    def look(name: str, p: Any) -> None:
        seen[f"{name} after"] = p.grad.sum().item()

    for name, p in model.named_parameters():
        handle = p.register_hook(functools.partial(halve, name))
        if "norm" in name:
            handle.remove()
        p.register_post_accumulate_grad_hook(functools.partial(look, name))
    return seen


@sees_whole
def hooks_from_before() -> dict[str, Any]:
    """Hooks of gradients that a script registered before ``prepare``, on a head that both ranks hold among others."""
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    found: dict[str, Any] = {"seen": [], "grads": []}
    for sharded in (False, True):
        model = build(config_for("llama", num_key_value_heads=1)).train()
        seen = _hooked(model)
        if sharded:
            tp_plugin.parallelize(model, tp_size=2)
        model(**batch(97, 0)).loss.backward()
        found["seen"].append(seen)
        found["grads"].append([p.grad.norm().item() for p in model.parameters()])
    return found


def test_hooks_from_before_prepare_see_whole_gradients() -> None:
    for found in run(2, hooks_from_before):
        plain, here = found["seen"]
        assert here == pytest.approx(plain, rel=1e-4, abs=1e-6) and len(plain) > 20
        assert found["grads"][1] == pytest.approx(found["grads"][0], rel=1e-5)


@sees_whole
def hooks_on_copies() -> dict[str, Any]:
    """A hook that the script puts on a copy before the copy's first forward gets whole gradients once, not twice."""
    whole, model = _models(num_key_value_heads=1)
    found: dict[str, Any] = {"seen": []}
    for one in (copy.deepcopy(whole), copy.deepcopy(model)):
        found["seen"].append(_hooked(one))
        one(**batch(97, 0)).loss.backward()
    return found


def test_hooks_on_a_copy_see_whole_gradients() -> None:
    for found in run(2, hooks_on_copies):
        plain, here = found["seen"]
        assert here == pytest.approx(plain, rel=1e-4, abs=1e-6) and len(plain) > 20
