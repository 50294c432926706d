"""No activation is copied for a collective that can run in place or into one tensor; counted as torch dispatches."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapted, build, config_for
from torch.utils._python_dispatch import TorchDispatchMode
from workers import run
from zoo import fresh

import tp_plugin

COPIES = ("clone", "copy_", "cat", "stack", "_to_copy", "constant_pad_nd")
"""Operations by which a tensor of an activation's size is written again without anything being computed."""


class Copies(TorchDispatchMode):
    """Counts the plugin's own copies of at least ``least`` elements."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found = least, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in COPIES and isinstance(result, torch.Tensor) and result.numel() >= self.least:
            file = caller()
            # it scatters what it has reduced
            gloos_own = name == "copy_" and file.endswith(("mesh/groups.py", "mesh/waiting.py"))
            of_norms = file.endswith("mesh/buckets.py")  # gradients of parameters
            self.found += PLUGIN in file and not gloos_own and not of_norms
        return result


def caller() -> str:
    """The file that called the operation, or torch's if it was torch: autograd, or a backend's own copies."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.endswith(BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_filename  # type: ignore[no-any-return]


PLUGIN = str(Path(tp_plugin.__file__).parent)
BETWEEN = ("torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/utils/_python_dispatch.py")


def batch(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def copies_case(
    model_type: str, overrides: dict[str, Any], options: dict[str, Any], method: str, size: int, length: int
) -> dict[str, Any]:
    """Run on every rank: the plugin's copies for each further layer, and how far gradients are from the whole's."""
    layers = "n_layer" if model_type.startswith("gpt") else "num_hidden_layers"
    found: dict[str, Any] = {"apart": 0.0}
    counts: dict[tuple[int, str], int] = {}
    for depth in (1, 3):
        fresh(**options)
        whole = build(config_for(model_type, **{layers: depth}, use_cache=False, **overrides)).train()
        if method:
            whole = adapted(whole, method)
        sharded = copy.deepcopy(whole)
        tp_plugin.parallelize(sharded, tp_size=2)
        for model in (whole, sharded):
            given = batch(size, length)
            # a rank's share of the hidden states, which is what sequence parallelism copies at least
            least = size * (length // 2 if options else length) * 48
            hidden = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
            with Copies(least) as forward:
                base = model.get_base_model() if method else model
                trunk = getattr(base, base.base_model_prefix)
                output = trunk(inputs_embeds=hidden).last_hidden_state
            with Copies(least) as backward:
                output.square().mean().backward()
            for way, mode in (("forward", forward), ("backward", backward)):
                counts[depth, way] = mode.found
            found.setdefault("inputs", []).append(hidden.grad)
        layouts = sharded.tp_record.plan.layouts if not method else sharded.base_model.model.tp_record.plan.layouts
        inner = sharded.base_model.model if method else sharded
        local = dict(inner.named_parameters())
        rank = torch.distributed.get_rank()
        for name, parameter in (whole.base_model.model if method else whole).named_parameters():
            if parameter.grad is not None and parameter.grad.norm() > 1e-9:
                want = layouts[name].shard(parameter.grad, rank)
                apart = (local[name].grad - want).norm() / parameter.grad.norm()
                found["apart"] = max(found["apart"], apart.item())
        one, other = found.pop("inputs")
        found["apart"] = max(found["apart"], ((one - other).norm() / one.norm()).item())
    for way in ("forward", "backward"):
        found[way] = (counts[3, way] - counts[1, way]) / 2
    return found


SEQUENCE = {"sequence_parallel": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, int, int, int, int]] = {
    # model, overrides, options, adapters, batch, tokens; copies a layer, forward and backward
    "llama": ("llama", {}, {}, "", 2, 12, 0, 0),
    "gpt2": ("gpt2", {}, {}, "", 2, 12, 0, 0),
    "fused": ("llama", {}, {"fuse": True}, "", 2, 12, 0, 2),
    "parallel residual": ("gptj", {}, {}, "", 2, 12, 0, 0),
    "adapters": ("llama", {}, {}, "lora", 2, 12, 0, 0),
    "sequence, batch of one": ("llama", {}, SEQUENCE, "", 1, 12, 0, 0),
    "sequence": ("llama", {}, SEQUENCE, "", 2, 12, 4, 6),
    "sequence, filled up": ("llama", {}, SEQUENCE, "", 2, 11, 4 + 2, 6 + 2),
}
"""Batches of one are gathered and scattered as they lie; larger ones are transposed once for each collective, in two
operations if the last rank's tokens are filled up. ``fuse`` joins the gradients of linears that run as one."""


@pytest.mark.parametrize("name", CASES)
def test_copies_of_a_layer(name: str) -> None:
    model_type, overrides, options, method, size, length, forward, backward = CASES[name]
    for found in run(2, copies_case, model_type, overrides, options, method, size, length):
        assert found["apart"] <= 1e-4, found
        assert (found["forward"], found["backward"]) == (forward, backward), found


def watched_case(how: str) -> tuple[float, float]:
    """Run on every rank: the gradient at a block's input as a script sees it by a hook, and how far parameters' are."""
    fresh()
    whole = build(config_for("llama", use_cache=False)).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    seen: dict[bool, torch.Tensor] = {}
    for model in (whole, sharded):

        def watch(module: Any, args: Any, kwargs: Any, model: Any = model) -> None:
            x = kwargs["hidden_states"]
            if how == "hook":
                x.register_hook(lambda grad: seen.__setitem__(model is sharded, grad.clone()))
            else:
                x.retain_grad()
                seen[model is sharded] = x

        model.model.layers[1].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
        model(**batch(2, 12)).loss.backward()
    layouts, rank = sharded.tp_record.plan.layouts, torch.distributed.get_rank()
    apart = 0.0
    for (name, parameter), mine in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        want = layouts[name].shard(parameter.grad, rank)
        apart = max(apart, ((mine.grad - want).norm() / parameter.grad.norm()).item())
    one, mine = (seen[is_sharded] if how == "hook" else seen[is_sharded].grad for is_sharded in (False, True))
    summed = mine.clone()
    torch.distributed.all_reduce(summed)
    return ((summed - one).norm() / one.norm()).item(), apart


@pytest.mark.parametrize("how", ["hook", "retain_grad"])
def test_a_watched_gradient_comes_by_autograd(how: str) -> None:
    """It is the rank's part, and stays what it is while the ranks' sum is made."""
    for at_input, apart in run(2, watched_case, how):
        assert at_input <= 1e-4 and apart <= 1e-4
