"""What a layer costs in Python: calls of ours in each direction, and hooks; on small batches a GPU waits for them."""

from __future__ import annotations

import sys
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
    """Counts Python calls into the plugin while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def _seen(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event == "call" and frame.f_code.co_filename.startswith(PLUGIN)

    def __enter__(self) -> Calls:
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)


def costs_case(sequence_parallel: bool) -> tuple[float, float, int]:
    """Run on every rank: calls of a Llama layer forward and backward, and its hooks."""
    found, hooks = [], 0
    for depth in (1, 3):
        fresh(sequence_parallel=sequence_parallel)
        config = config_for("llama", num_hidden_layers=depth, use_cache=False)
        model = tp_plugin.parallelize(build(config).train(), tp_size=2).model
        angles = model.rotary_emb(torch.zeros(1, 12, 48), torch.arange(12)[None])
        with require().region.step():  # as in the model's forward
            for _ in range(2):  # what is looked at once
                x = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
                with Calls() as forward:
                    y = x
                    for layer in model.layers:
                        y = layer(y, position_embeddings=angles)
                with Calls() as backward:
                    y.square().mean().backward()
        found.append((forward.count, backward.count))
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.layers[1 % depth].modules())
    one, three = found
    return (three[0] - one[0]) / 2, (three[1] - one[1]) / 2, hooks


@pytest.mark.parametrize("sequence_parallel, forward, backward, hooks", [(False, 140, 95, 8), (True, 205, 215, 11)])
def test_calls_of_a_layer(sequence_parallel: bool, forward: int, backward: int, hooks: int) -> None:
    """Two blocks with five column-parallel and two row-parallel linears; four or eight collectives."""
    for calls_forward, calls_backward, found in run(2, costs_case, sequence_parallel):
        assert calls_forward <= forward and calls_backward <= backward and found <= hooks
