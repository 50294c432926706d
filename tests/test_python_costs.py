"""What a layer costs in Python: calls in each direction, ours and all, and hooks. On small batches, GPUs wait."""

from __future__ import annotations

import contextlib
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, config_for
from workers import run
from zoo import fresh

import tp_plugin
from tp_plugin.runtime.runtime import require

PLUGIN = str(Path(tp_plugin.__file__).parent)


class Calls:
    """Counts Python calls while it is entered: into the plugin, and all."""

    def __init__(self) -> None:
        self.ours = self.all = 0

    def _seen(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.all += 1
            self.ours += frame.f_code.co_filename.startswith(PLUGIN)

    def __enter__(self) -> Calls:
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)


def counted(model: Any, script: Any) -> tuple[int, int, int, int]:
    """Calls of a model's layers, forward and backward: ours, and all."""
    angles = model.rotary_emb(torch.zeros(1, 12, 48), torch.arange(12)[None])
    with script:
        for _ in range(2):  # what is looked at once
            x = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
            with Calls() as forward:
                y = x
                for layer in model.layers:
                    y = layer(y, position_embeddings=angles)
            with Calls() as backward:
                y.square().mean().backward()
    return forward.ours, backward.ours, forward.all, backward.all


def costs_case(sequence_parallel: bool) -> tuple[list[float], int]:
    """Run on every rank: calls of a Llama layer (ours, and all beyond those of one process), and its hooks."""
    found, hooks = [], 0
    # DeepSpeed leaves one of its own in the process of tests that ran before
    with unittest.mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
        for depth in (1, 3):
            fresh(sequence_parallel=sequence_parallel)
            config = config_for("llama", num_hidden_layers=depth, use_cache=False)
            plain = counted(build(config).train().model, contextlib.nullcontext())
            model = tp_plugin.parallelize(build(config).train(), tp_size=2).model
            ours = counted(model, require().region.step())  # as in the model's forward
            found.append((*ours[:2], ours[2] - plain[2], ours[3] - plain[3]))
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.layers[1 % depth].modules())
    return [(three - one) / 2 for one, three in zip(*found, strict=True)], hooks


# of ours forward, backward, and of all beyond one process's layer: what was counted, and at most two more
@pytest.mark.parametrize(
    "sequence_parallel, budget, hooks", [(False, (122, 53, 189, 96), 8), (True, (190, 172, 286, 253), 11)]
)
def test_calls_of_a_layer(sequence_parallel: bool, budget: tuple[int, ...], hooks: int) -> None:
    """Two blocks with five column-parallel and two row-parallel linears; four or eight collectives."""
    for calls, found in run(2, costs_case, sequence_parallel):
        assert all(one <= most for one, most in zip(calls, budget, strict=True)), calls
        assert found <= hooks
