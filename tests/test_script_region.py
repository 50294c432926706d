"""What a script does to parameters and gradients outside of steps is what it does to those of one process."""

from __future__ import annotations

import copy
import json
import os
import traceback
from typing import Any

import pytest
import torch
from habits import HABITS
from models import batch, build, config_for
from workers import run, sees_whole

from tp_plugin.config.keys import ENV_OPTIONS


def _numbers(value: Any) -> Any:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return torch.tensor(value.detach().tolist(), dtype=torch.float64)
    if isinstance(value, tuple | list):
        return [_numbers(item) for item in value]
    return value


def _far(one: Any, other: Any) -> float:
    """The largest difference relative to the largest element."""
    if isinstance(one, list):
        return max((_far(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one is None or isinstance(one, bool | str):
        return 0.0 if one == other else float("inf")
    one, other = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    if one.shape != other.shape:
        return float("inf")
    if not one.numel() or torch.equal(one, other):
        return 0.0
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))


def everything(model: Any) -> list[Any]:
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP2 leaves some gathered after a forward, without gradients
            module.reshard()
    weights = [p.detach() for p in model.parameters()]
    grads = [p.grad if p.grad is not None else torch.zeros(()) for p in model.parameters()]
    return [_numbers(weights), _numbers(grads)]


@sees_whole
def habits_case(
    model_type: str, overrides: dict[str, Any], options: dict[str, Any], names: list[str]
) -> dict[str, Any]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    os.environ[ENV_OPTIONS] = json.dumps(options)
    whole = build(config_for(model_type, **overrides)).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    os.environ.pop(ENV_OPTIONS)
    return compared(whole, sharded, names)


def compared(whole: Any, sharded: Any, names: list[str]) -> dict[str, Any]:
    """How far what each habit returns, and weights and gradients after it, are from the plain model's; or an error."""
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    whole.batch = sharded.batch = batch(97, 3)
    found: dict[str, Any] = {}
    for name in names:
        results = []
        for model in (whole, sharded):
            _start_again(model, start)
            torch.manual_seed(0)
            try:
                result = _numbers(HABITS[name](model))
                results.append([result, *everything(model)])
            except Exception:
                results.append(traceback.format_exc()[-1500:])
        plain, here = results
        if isinstance(plain, str) or isinstance(here, str):
            found[name] = plain if isinstance(plain, str) else here
        else:
            found[name] = [_far(one, other) for one, other in zip(plain, here, strict=True)]
    return found


AT_ONCE = 12
"""Habits in one call of the ranks, whose patience is of one case."""


def _check(world: int, case: Any, *args: Any) -> None:
    *others, names = args
    wrong: dict[str, Any] = {}
    for at in range(0, len(names), AT_ONCE):
        for found in run(world, case, *others, names[at : at + AT_ONCE]):
            wrong |= {name: far for name, far in found.items() if isinstance(far, str) or not max(far) <= 2e-5}
    assert not wrong, "\n".join(f"{name}: {far}" for name, far in wrong.items())


CASES: list[Any] = [
    ("llama", {"num_key_value_heads": 1}, {}),
    ("gpt2", {}, {}),
    ("llama", {"num_key_value_heads": 1}, {"sequence_parallel": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[2]]))
def test_habits(case: Any) -> None:
    _check(2, habits_case, *case, list(HABITS))


def _start_again(model: Any, start: dict[str, torch.Tensor]) -> None:
    """The weights of ``start``, and gradients without rounding, whose signs would be others on two ranks."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    model.zero_grad()
    model(**model.batch).loss.backward()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad.copy_(torch.randn(p.shape, generator=generator).mul_(0.01).relu_())


@sees_whole
def fsdp2_case(names: list[str]) -> dict[str, Any]:
    import test_fsdp2

    sharded, config = test_fsdp2.make(2, "llama", {"num_key_value_heads": 1})
    whole = build(config).train()
    return compared(whole, sharded, names)


NO_HABITS_UNDER_FSDP2 = {
    "another_dtype_and_back": "FSDP2 keeps copies of its own",
    "average_of_a_copy": "FSDP2 alone cannot run a copy of a model that it has split",
    "swa": "FSDP2 alone cannot run a copy of a model that it has split",
    "hook_that_zeroes_a_neuron": "FSDP2 calls no hooks of the parameters that a script sees",
    "hook_that_scales": "FSDP2 calls no hooks of the parameters that a script sees",
    "swapped": "the memory of FSDP2's parameters stays where it is; FSDP2 alone ignores the assignment",
    "average_foreach": "DTensor has no torch._foreach_copy_",
    "a_layer_by_itself": "FSDP2 leaves gathered what was called without the rest of its group",
    "soft_updates_of_another_model": "FSDP2 alone takes no DTensor beside a tensor",
    "printing": "FSDP2 alone prints DTensors",
    "loss_by_hand_and_autograd_grad": "FSDP2 computes with other parameters than a script sees",
    "gradients_by_autograd_grad": "FSDP2 computes with other parameters than a script sees",
}


def test_habits_under_fsdp2() -> None:
    names = [name for name in HABITS if name not in NO_HABITS_UNDER_FSDP2]
    _check(2, fsdp2_case, names)
