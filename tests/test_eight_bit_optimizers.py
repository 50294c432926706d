"""bitsandbytes' 8-bit optimizers on shards: bit for bit where blocks are those of the whole, else as near as 8 bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build, config_for
from test_layout import layouts
from test_save_state import accelerated
from workers import run, sees_whole

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout
from tp_plugin.policy.state_blocks import replicas_agree, scales_layout
from tp_plugin.shard import block_states

bnb = pytest.importorskip("bitsandbytes")

NO_BIAS = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
ALIGNED = {
    **NO_BIAS, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
"""At a tp of 4 a rank has 256 columns of each row of a row-parallel weight."""
MISALIGNED = {**NO_BIAS, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4}
"""Shards are smaller than 4096 elements, of which the whole weights have more; the vocabulary is padded."""
STEPS = 4


# --- where scales lie -------------------------------------------------------------------------------------------------


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
        for elements, number in zip(blocks, mine.tolist(), strict=True):
            expected = torch.arange((number - 1) * block, min(number * block, numel)) + 1
            assert torch.equal(elements, expected) if number else not elements.any()  # padding


ROWS, COLUMNS = (((0, 8),), ((8, 16),)), (((0, 512),), ((512, 1024),))


def test_where_blocks_are_those_of_the_whole() -> None:
    assert scales_layout(ParamLayout((16, 64), 0, ROWS), 256) is not None
    assert scales_layout(ParamLayout((16, 63), 0, ROWS), 256) is None
    assert scales_layout(ParamLayout((3, 1024), 1, COLUMNS), 256) is not None
    assert scales_layout(ParamLayout((3, 1024), 1, COLUMNS), 1024) is None
    assert scales_layout(ParamLayout((15, 64), 0, (((0, 8),), ((8, 15),))), 256) is not None  # the last one is shorter
    assert scales_layout(ParamLayout((15, 64), 0, (((0, 8),), ((8, 15),)), pad_to=8), 256) is None
    assert scales_layout(ParamLayout((12, 64), 0, (((0, 8),), ((8, 12),)), pad_to=8), 256) is not None
    shared = ParamLayout((24, 8), 0, (((0, 9), (18, 24)), ((9, 18), (18, 24))))
    assert not replicas_agree(shared) and scales_layout(shared, 256) is None
    assert replicas_agree(ParamLayout((8, 8), 0, (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),))))


def decoded(state: dict[str, Any]) -> torch.Tensor:
    return block_states._decode(state["state1"], state["absmax1"], state["qmap1"])


def error(found: dict[str, Any], expected: torch.Tensor) -> float:
    """The largest deviation of a state's elements, relative to the scale of their block."""
    apart = (decoded(found) - expected).flatten().abs().split(256)
    return max((one.max() / scale).item() for one, scale in zip(apart, found["absmax1"], strict=True))


@pytest.mark.parametrize("shape, dim", [((50, 96), 1), ((97, 50), 0)])
def test_states_of_other_blocks_are_rounded_once(shape: tuple[int, int], dim: int) -> None:
    """Saved of two ranks, loaded by the same two, by one process and by four: exactly, and within one rounding."""

    def layout_of(tp: int) -> ParamLayout:
        rows = -(-shape[dim] // tp)
        parts = tuple(((at, min(at + rows, shape[dim])),) for at in range(0, shape[dim], rows))
        return ParamLayout(shape, dim, parts, pad_to=rows)

    qmap = bnb.functional.create_dynamic_map(signed=True)
    one_rounding = (qmap.diff().max() / 2 + 1e-6).item()
    layout, four = layout_of(2), layout_of(4)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shards = []
    for rank in range(2):
        codes, scales = block_states._encode(layout.shard(values, rank), qmap)
        shards.append({"step": 3, "state1": codes, "absmax1": scales, "qmap1": qmap})
    saved = block_states.whole(shards[0], layout, lambda key, at: at.gather([shard[key] for shard in shards]))
    exact = layout.gather([decoded(shard) for shard in shards])
    assert saved["state1"].shape == shape and 0 < error(saved, exact) <= one_rounding
    for rank, shard in enumerate(shards):
        again = block_states.mine(saved, layout, rank)
        assert again.keys() == shard.keys() and all(torch.equal(again[k], v) for k, v in shard.items() if k != "step")
    for rank in range(4):
        assert error(block_states.mine(saved, four, rank), four.shard(decoded(saved), rank)) <= one_rounding
    # one process has trained on: what the ranks had is of before
    codes, scales = block_states._encode(-values, qmap)
    trained_on = {**saved, "step": 4, "state1": codes, "absmax1": scales}
    for rank in range(2):
        expected = layout.shard(decoded(trained_on), rank)
        assert error(block_states.mine(trained_on, layout, rank), expected) <= one_rounding


# --- numbers, and states that are saved and loaded --------------------------------------------------------------------


def make(kind: str, model: torch.nn.Module) -> Any:
    return getattr(bnb.optim, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)


def steps_of(models: list[torch.nn.Module], optimizers: list[Any], first: int, count: int) -> None:
    """Steps with the clipped gradients of one process: the first model is whole, those after it maybe shards."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.param_entry import layout_of

    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        parameters = list(models[0].parameters())
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * torch.rand((), generator=generator)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for model in models[1:]:
            for parameter, whole in zip(model.parameters(), parameters, strict=True):
                layout, grad = layout_of(parameter), whole.grad
                assert grad is not None
                parameter.grad = grad.clone() if layout is None else layout.shard(grad, require().mesh.unit.rank)
        for optimizer in optimizers:
            optimizer.step()


def tensors(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for at, one in state["state"].items():
        yield from ((f"{at} {key}", value) for key, value in one["__bnb_optimizer_quant_state__"].items())


def sharded_case(kind: str, shape: dict[str, Any], tp: int, pp: int) -> dict[str, Any]:
    """Steps whole, sharded and in 32 bits; then on from the sharded state (sharded and whole) and the whole one."""
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize, shard_optimizer
    from tp_plugin.tensor.param_entry import layout_of

    stop()
    torch_utils.install()
    whole = build(config_for("llama", num_hidden_layers=pp, **shape))
    start = copy.deepcopy(whole)
    models = {name: copy.deepcopy(whole) for name in ("sharded", "32 bits", "again", "plain", "of plain")}
    optimizers = {name: make(kind, model) for name, model in models.items()}
    optimizers["32 bits"] = make(kind.replace("8bit", "32bit"), models["32 bits"])
    optimizers["whole"] = make(kind, whole)

    def shard(name: str) -> None:
        parallelize(models[name], tp, options=RunConfig(tp, pp_size=pp))
        shard_optimizer(optimizers[name], require())

    def mine(model: torch.nn.Module) -> list[torch.Tensor]:
        """What this rank holds of the weights, or would hold."""
        layouts, rank = [layout_of(p) for p in models["sharded"].parameters()], require().mesh.unit.rank
        pairs = [(p.detach(), layout) for p, layout in zip(model.parameters(), layouts, strict=True)]
        return [p if layout is None or layout_of(one) else layout.shard(p, rank)
                for one, (p, layout) in zip(model.parameters(), pairs, strict=True)]  # fmt: skip

    def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
        """Relative to the way from the start."""
        apart, moved = (
            sum((x - y).double().square().sum() for x, y in zip(mine(a), mine(other), strict=True))
            for other in (b, start)
        )
        return float((apart / moved).sqrt())

    shard("sharded")
    steps_of([whole, models["32 bits"], models["sharded"]],
             [optimizers[name] for name in ("whole", "32 bits", "sharded")], 0, STEPS)  # fmt: skip
    found: dict[str, Any] = {name: distance(models[name], whole) for name in ("sharded", "32 bits")}
    weights = {name: model.state_dict() for name, model in (("whole", whole), ("sharded", models["sharded"]))}
    states = {name: copy.deepcopy(optimizers[name].state_dict()) for name in weights}
    kept = [dict(tensors(state)) for state in states.values()]
    found["same form"] = [(k, v.shape, v.dtype) for k, v in kept[0].items()] == [
        (k, v.shape, v.dtype) for k, v in kept[1].items()
    ]
    found["same state"] = all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    found["8 bits"] = sum(value.dtype == torch.uint8 for value in kept[1].values())
    for name, source in (("again", "sharded"), ("plain", "sharded"), ("of plain", "whole")):
        models[name].load_state_dict(weights[source])
        if name != "plain":
            shard(name)
        optimizers[name].load_state_dict(copy.deepcopy(states[source]))
    names = ("sharded", "again", "plain", "of plain")
    steps_of([whole, *(models[name] for name in names)], [optimizers[name] for name in ("whole", *names)], STEPS, 2)
    found |= {name: distance(models[name], models["sharded"]) for name in ("again", "plain")}
    return {**found, "of plain": distance(models["of plain"], whole)}


@pytest.mark.parametrize("tp, pp, kind", [(2, 1, "Lion8bit"), (4, 1, "AdamW8bit"), (2, 2, "AdamW8bit")])
def test_where_blocks_are_whole_the_numbers_are(tp: int, pp: int, kind: str) -> None:
    for found in run(tp * pp, sharded_case, kind, ALIGNED, tp, pp):
        assert found["same form"] and found["same state"] and found["8 bits"] > 0
        assert [found[name] for name in ("sharded", "again", "plain", "of plain")] == [0, 0, 0, 0]
        assert found["32 bits"] > 1e-3


KINDS = [(2, "AdamW8bit"), (4, "AdamW8bit"), (4, "Lion8bit"), (2, "PagedAdamW8bit"), (2, "Adam8bit")]


@pytest.mark.parametrize("tp, kind", KINDS)
def test_other_blocks_differ_less_than_8_bits_from_32(tp: int, kind: str) -> None:
    for found in run(tp, sharded_case, kind, MISALIGNED, tp, 1):
        assert found["same form"] and not found["same state"]
        assert found["again"] == 0 < found["sharded"] <= found["32 bits"]
        assert 0 < found["plain"] <= found["32 bits"] and 0 < found["of plain"] <= found["32 bits"]


def test_32_bits_are_exact() -> None:
    for found in run(2, sharded_case, "PagedAdamW32bit", MISALIGNED, 2, 1):
        assert found["same form"] and found["same state"] and found["8 bits"] == 0
        assert [found[name] for name in ("sharded", "again", "plain", "of plain")] == [0, 0, 0, 0]


# --- scripts ----------------------------------------------------------------------------------------------------------


@sees_whole
def script_case(root: str) -> dict[str, Any]:
    """Train, save the state, train on; then a new script that loads it and trains on. Some states in 32 bits."""
    from accelerate import Accelerator

    manager = bnb.optim.GlobalOptimManager.get_instance()
    found: dict[str, Any] = {}

    def start(seed: int) -> tuple[Any, Any, Any]:
        manager.initialize()
        accelerator, model = Accelerator(), build(config_for("llama", **MISALIGNED), seed=seed)
        layers = model.model.layers
        manager.override_config(layers[0].self_attn.q_proj.weight, "optim_bits", 32)
        manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})  # as Trainer does
        optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator: Any, model: Any, optimizer: Any, first: int) -> list[Any]:
        seen = []
        for step in range(first, first + 2):
            loss = model(**batch(97, 2 * step + accelerator.process_index)).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            seen.append((loss.item(), float(norm)))
        return seen

    with accelerated(2):
        accelerator, model, optimizer = start(0)
        found["seen"] = train(accelerator, model, optimizer, 0)
        accelerator.save_state(f"{root}/state")
        bare = model.module  # (unwrap_model imports DeepSpeed)
        layer, states = bare.model.layers[0], optimizer.optimizer.state
        named = {"q": layer.self_attn.q_proj, "embedding": bare.model.embed_tokens, "up": layer.mlp.up_proj}
        found["states"] = {
            name: (str(states[module.weight]["state1"].dtype), tuple(states[module.weight]["state1"].shape))
            for name, module in named.items()
        }
        found["on"] = train(accelerator, model, optimizer, 2)
        del optimizer
    with accelerated(2):
        accelerator, model, optimizer = start(3)
        accelerator.load_state(f"{root}/state")
        found["again"] = train(accelerator, model, optimizer, 2)
    manager.initialize()
    return found


def test_a_script_saves_and_goes_on(tmp_path: Path) -> None:
    found = run(4, script_case, str(tmp_path))
    for of_rank in found:
        assert of_rank["on"] == of_rank["again"]
        assert of_rank["states"] == {
            "q": ("torch.float32", (96, 96)), "embedding": ("torch.float32", (97, 96)), "up": ("torch.uint8", (80, 96)),
        }  # fmt: skip
    assert found[0]["on"][0][0] != found[2]["on"][0][0] and found[0]["on"][0][1] == found[2]["on"][0][1]
    # one process without tp_size: the same steps, and on from the state
    model = build(config_for("llama", **MISALIGNED))
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
    for step, tolerance in enumerate((1e-5, 1e-3)):
        losses = [model(**batch(97, 2 * step + process)).loss for process in (0, 1)]
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for rank, of_rank in enumerate(found):
            expected = losses[rank // 2].item(), float(norm)
            assert of_rank["seen"][step] == pytest.approx(expected, rel=tolerance)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(torch.load(tmp_path / "state" / "optimizer.bin", weights_only=True))
    model(**batch(97, 0)).loss.backward()
    optimizer.step()
    assert {s["state1"].dtype for s in optimizer.state.values()} == {torch.uint8, torch.float32}


def refused_case() -> dict[str, str]:
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize, shard_optimizer

    stop()
    model = build(config_for("llama", **MISALIGNED))
    fused = build(config_for("gpt_bigcode", n_embd=72, n_inner=80, n_head=4))
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for one in (model, fused):
        parallelize(one, 2)
    optim, found = bnb.optim, {}

    def refuse(name: str, make: Any, of: torch.nn.Module = model) -> None:
        with pytest.raises(TPError) as raised:
            shard_optimizer(make(of.parameters()), require())
        found[name] = str(raised.value)

    for kind in ("LAMB", "LAMB8bit", "AdEMAMix8bit"):
        refuse(kind, getattr(optim, kind))
    refuse("LARS8bit", lambda parameters: optim.LARS8bit(parameters, lr=0.1, momentum=0.9))
    refuse("blocks", optim.AdamW8bit, fused)
    late = optim.AdamW8bit(model.parameters())
    shard_optimizer(late, require())
    manager.override_config(model.lm_head.weight, "max_unorm", 1.0)
    refuse("override", optim.AdamW8bit)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with pytest.raises(TPError, match=r"max_unorm=1\.0"):
        late.step()
    manager.initialize()
    return found


def test_what_looks_at_whole_tensors_is_refused() -> None:
    for found in run(2, refused_case):
        assert "optimizer LAMB looks at whole tensors" in found["LAMB"]
        for kind, option in {"LAMB8bit": "max_unorm=1.0", "LARS8bit": "max_unorm=0.02"}.items():
            assert f"{kind} with {option} looks at whole tensors" in found[kind] and "AdamW8bit" in found[kind]
        assert "AdamW8bit with max_unorm=1.0" in found["override"]
        assert "AdEMAMix8bit keeps two moments in one tensor" in found["AdEMAMix8bit"]
        assert "c_attn.weight in blocks of 256 elements that differ" in found["blocks"]


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP2"])
def test_engines_that_cut_shards_once_more_refuse_them(engine: str) -> None:
    from tp_plugin.engines.quantization import refuse_optimizer

    parameters = [torch.nn.Parameter(torch.zeros(2))]
    refuse_optimizer(bnb.optim.AdamW(parameters), engine)
    for optimizer in (bnb.optim.PagedAdamW8bit(parameters), bnb.optim.Lion(parameters, optim_bits=8)):
        with pytest.raises(TPError, match=rf"{type(optimizer).__name__} keeps its state in 8 bits.*{engine} cuts"):
            refuse_optimizer(optimizer, engine)
