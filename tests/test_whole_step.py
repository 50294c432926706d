"""Optimizers that look at whole matrices, against the same on one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from test_parallel import GQA
from workers import run

from tp_plugin.config.run_config import RunConfig

MAKERS = {
    "transformers": lambda model: _transformers(model),
    "torch": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
}


def _transformers(model: torch.nn.Module) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False)


def _same_gradients(model: torch.nn.Module) -> None:

    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.param_entry import layout_of

    for parameter in model.parameters():
        layout = layout_of(parameter)
        shape = parameter.shape if layout is None else layout.shape
        grad = torch.randn(shape)
        parameter.grad = grad if layout is None else layout.shard(grad, require().mesh.unit.rank)


def whole_step_case(kind: str, tp: int, stages: int) -> dict[str, Any]:
    from counted import ledger

    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize, shard_optimizer

    stop()
    torch_utils.install()
    torch.manual_seed(0)
    whole = build(config_for("llama", **GQA))
    sharded = copy.deepcopy(whole)
    # one optimizer is built before its model is sharded, as scripts do
    optimizers = [MAKERS[kind](model) for model in (whole, sharded)]
    parallelize(sharded, tp, options=RunConfig(tp, pp_size=stages))
    shard_optimizer(optimizers[1], require())
    calls = []
    optimizers[1].register_step_post_hook(lambda *args: calls.append(1))
    found: dict[str, Any] = {}
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        losses = found.setdefault("losses", [])
        torch.manual_seed(1)
        for step in range(4):
            if step == 2:  # stopped and gone on with
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            loss = model(**batch(97, step)).loss
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if kind == "muon":  # rounds to bf16, so it tells gradients apart that are equal up to their last digits
                _same_gradients(model)
            before = ledger["count"][f"all_gather/{'tp' if stages == 1 else 'unit'}"]
            optimizer.step()
            found["gathers"] = ledger["count"][f"all_gather/{'tp' if stages == 1 else 'unit'}"] - before
            optimizer.zero_grad()
    states = [model.state_dict() for model in (whole, sharded)]
    kept = [optimizer.state_dict()["state"] for optimizer in optimizers]
    shapes = [
        [tuple(v.shape) for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)] for state in kept
    ]
    layouts = sharded.tp_record.index.layouts
    stepped = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    split = [n for n, p in sharded.named_parameters() if id(p) in stepped and layouts[n].is_sharded]
    return found | {
        "weights": max((states[1][name] - value).abs().max().item() for name, value in states[0].items()),
        "shapes": shapes[0] == shapes[1], "hooks": len(calls), "split": len(split),
    }  # fmt: skip


@pytest.mark.parametrize(("tp", "stages"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_with_whole_parameters(kind: str, tp: int, stages: int) -> None:
    for found in run(tp * stages, whole_step_case, kind, tp, stages):
        assert found["losses"][4:] == pytest.approx(found["losses"][:4], rel=1e-5)
        assert found["weights"] <= (0 if kind == "muon" else 3e-4)
        assert found["shapes"] and found["hooks"] == 4
        assert found["gathers"] == 2 * found["split"] > 0  # parameter and gradient


class AdamW8bit(torch.optim.SGD):
    """Stands for torchao's, by its module and attribute."""

    __module__ = "torchao.optim.adam"
    block_size = 256


def blockwise_case() -> str:
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize, shard_optimizer

    stop()
    model = build(config_for("llama", **GQA))
    parallelize(model, 2)
    with pytest.raises(TPError) as raised:
        shard_optimizer(AdamW8bit(model.parameters(), lr=1.0), require())
    return str(raised.value)


def test_8_bit_states_are_refused() -> None:
    for message in run(2, blockwise_case):
        assert "torchao.optim.adam.AdamW8bit keeps its state in 8 bits" in message and "adamw_torch_fused" in message
