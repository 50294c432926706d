"""bitsandbytes' 8-bit optimizers on shards: bit for bit where blocks are those of the whole, else as near as 8 bits are."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, config_for
from test_layout import layouts
from workers import run

from tp_plugin.policy import ParamLayout
from tp_plugin.policy.state_blocks import replicas_agree, scales_layout

bnb = pytest.importorskip("bitsandbytes")

NO_BIAS = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "num_hidden_layers": 1}
ALIGNED = {
    **NO_BIAS, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 256,
    "num_key_value_heads": 4,
}  # fmt: skip
"""At a tp of 4 a rank has 256 columns of each row of a row-parallel weight."""
MISALIGNED = {**NO_BIAS, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4}
"""Shards are smaller than 4096 elements, of which the whole weights have more; the vocabulary is padded."""
STEPS = 4


def make(kind: str, model: torch.nn.Module) -> Any:
    return getattr(bnb.optim, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)


# --- where scales lie -----------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call imports
@given(layouts(), st.sampled_from((1, 2, 3, 4, 6)))
def test_scales_are_those_of_the_whole_where_blocks_are(layout: ParamLayout, block: int) -> None:
    found = scales_layout(layout, block) if layout.is_sharded else None
    if found is None:
        return
    numel = math.prod(layout.shape)
    numbers, scales = torch.arange(1, numel + 1).view(layout.shape), torch.arange(1, -(-numel // block) + 1)
    shards = [found.shard(scales, rank) for rank in range(layout.ranks)]
    assert torch.equal(found.gather(shards), scales)
    for rank, mine in enumerate(shards):
        blocks = layout.shard(numbers, rank).flatten().split(block)
        assert len(blocks) == len(mine)
        for elements, number in zip(blocks, mine.tolist(), strict=True):
            expected = torch.arange((number - 1) * block, min(number * block, numel)) + 1
            assert torch.equal(elements, expected) if number else not elements.any()  # padding


def test_where_blocks_are_those_of_the_whole() -> None:
    rows, columns = (((0, 8),), ((8, 16),)), (((0, 512),), ((512, 1024),))
    assert scales_layout(ParamLayout((16, 64), 0, rows), 256) is not None
    assert scales_layout(ParamLayout((16, 63), 0, rows), 256) is None
    assert scales_layout(ParamLayout((3, 1024), 1, columns), 256) is not None
    assert scales_layout(ParamLayout((3, 1024), 1, columns), 1024) is None
    assert scales_layout(ParamLayout((15, 64), 0, (((0, 8),), ((8, 15),))), 256) is not None  # the last one is shorter
    assert scales_layout(ParamLayout((15, 64), 0, (((0, 8),), ((8, 15),)), pad_to=8), 256) is None
    assert scales_layout(ParamLayout((12, 64), 0, (((0, 8),), ((8, 12),)), pad_to=8), 256) is not None
    shared = ParamLayout((24, 8), 0, (((0, 9), (18, 24)), ((9, 18), (18, 24))))
    assert not replicas_agree(shared) and scales_layout(shared, 256) is None
    assert replicas_agree(ParamLayout((8, 8), 0, (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),))))


# --- numbers, and states that are saved and loaded --------------------------------------------------------------------


def steps_of(models: list[torch.nn.Module], optimizers: list[Any], first: int, count: int = STEPS) -> list[float]:
    """Steps with the clipped gradients of one process: the first model is whole, all others are shards."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.param_entry import layout_of

    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        parameters = list(models[0].parameters())
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * torch.rand((), generator=generator)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for model in models[1:]:
            for parameter, one in zip(model.parameters(), parameters, strict=True):
                layout = layout_of(parameter)
                assert one.grad is not None
                parameter.grad = one.grad.clone() if layout is None else layout.shard(one.grad, require().mesh.unit.rank)
        for optimizer in optimizers:
            optimizer.step()
    return []


def sharded_case(kind: str, shape: dict[str, Any], tp: int) -> dict[str, Any]:
    """Steps whole and sharded; then from the saved state, at this tp, and of one process."""
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize, shard_optimizer

    stop()
    torch_utils.install()
    whole = build(config_for("llama", **shape))
    sharded, exact, again, plain = (copy.deepcopy(whole) for _ in range(4))
    optimizers = [make(kind, model) for model in (whole, sharded)]
    parallelize(sharded, tp)
    shard_optimizer(optimizers[1], require())
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    exactly = torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.1)
    steps_of([whole, sharded], optimizers, 0)
    steps_of([exact], [exactly], 0)
    wholes = [model.state_dict() for model in (whole, exact, sharded)]

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        moved = sum((wholes[0][n] - start[n]).double().square().sum() for n in start)
        return float((sum((a[n] - b[n]).double().square().sum() for n in start) / moved).sqrt())

    found: dict[str, Any] = {"sharded": apart(wholes[2], wholes[0]), "exact": apart(wholes[1], wholes[0])}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    found["dtypes"] = [
        [str(tensors(state)["state1"].dtype) for state in one["state"].values()] for one in states
    ]
    found["states"] = all(
        torch.equal(value, tensors(b)[key])
        for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True)
        for key, value in tensors(a).items()
    )
    found["decoded"] = decoded_apart(states[0], states[1])

    again.load_state_dict(wholes[2])
    plain.load_state_dict(wholes[2])
    resumed = [make(kind, model) for model in (again, plain)]
    parallelize(again, tp)
    shard_optimizer(resumed[0], require())
    for optimizer in resumed:
        optimizer.load_state_dict(copy.deepcopy(states[1]))
    steps_of([plain, sharded, again], [resumed[1], optimizers[1], resumed[0]], STEPS, 2)
    on = [model.state_dict() for model in (sharded, again, plain)]
    found["again"], found["plain"] = (apart(on[0], one) for one in on[1:])
    return found


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return state["__bnb_optimizer_quant_state__"]


def decoded_apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of states, relative to the largest of their block."""
    from bitsandbytes.functional import dequantize_blockwise

    worst = 0.0
    for one, other in zip(a["state"].values(), b["state"].values(), strict=True):
        values = []
        for state in (tensors(one), tensors(other)):
            if state["state1"].dtype == torch.uint8:
                values.append(dequantize_blockwise(state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256))
            else:
                values.append(state["state1"])
        worst = max(worst, ((values[0] - values[1]).abs().max() / values[0].abs().max()).item())
    return worst


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_blocks_of_the_whole(kind: str, tp: int) -> None:
    for found in run(tp, sharded_case, kind, ALIGNED, tp):
        print(found)
        assert found["sharded"] == 0 and found["states"] and found["again"] == 0 and found["plain"] == 0


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", "Adam8bit", "Lion8bit", "AdamW32bit"])
def test_other_blocks(kind: str, tp: int) -> None:
    for found in run(tp, sharded_case, kind, MISALIGNED, tp):
        print(kind, tp, found)
