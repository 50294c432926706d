"""Sequence parallelism: the numbers of one process, tokens split between the blocks, the same bytes."""

from __future__ import annotations

import copy
import gc
import json
import os
from typing import Any

import pytest
import torch
from memory import LiveBytes
from models import build, config_for
from test_parity import LAYERS, assert_parity, parity
from workers import WorkerError, run

from tp_plugin.cli.parity_result import Result

USUAL = ("llama", "qwen3", "gpt2", "gptj", "bert", "t5", "falcon")
OTHERS = (
    "opt",
    "bart",
    "gemma2",
    "olmo2",
    "phi3",
    "gpt_neox",
    "bloom",
    "cohere",
    "stablelm",
    "mpt",
    "glm4",
    "roberta",
    "whisper",
)


def split_tokens(model_type: str, overrides: dict[str, Any], tp: int) -> Result:
    return parity(model_type, overrides, tp, sequence_parallel=True)


@pytest.mark.parametrize(
    "model_type, tp",
    [
        pytest.param(model_type, tp, marks=() if tp == 2 and model_type in USUAL else pytest.mark.full)
        for model_type in USUAL + OTHERS
        for tp in (2, 4)
    ],
)
def test_parity(model_type: str, tp: int) -> None:
    """11 tokens, which neither 2 nor 4 divides; right padding."""
    assert_parity(run(tp, split_tokens, model_type, {}, tp))


def test_collectives() -> None:
    """A gather and a reduce-scatter where there was an all-reduce; the gradients of norms summed, in one bucket."""
    for result in run(2, split_tokens, "llama", {"attention_bias": False, "mlp_bias": False}, 2):
        blocks = 2 * LAYERS
        assert result.collectives.pop("reduce_scatter/tp") == 2 * blocks
        # one for each block and direction, one more where the backward needs a block's input again; the join, the
        # split's backward, the logits
        assert result.collectives.pop("all_gather/tp") == 3 * blocks + 2 + 1
        # the embedding, the head's backward, the norms in all layers
        assert result.collectives.pop("all_reduce/tp") == 2 + 1
        assert result.collectives.pop("all_gather/unit_cpu") == 1
        assert result.collectives == {}


def kept(tp: int, sequence_parallel: bool) -> float:
    """Run on every rank: bytes that autograd keeps of a layer: a third of what five layers keep beyond two."""
    import tp_plugin
    from tp_plugin.config.keys import ENV_OPTIONS
    from tp_plugin.runtime.start import stop

    stop()
    os.environ[ENV_OPTIONS] = json.dumps({"sequence_parallel": sequence_parallel})
    found = []
    for layers in (2, 5):
        size = {"n_layer": layers, "n_embd": 64, "n_head": 4, "n_inner": 256, "vocab_size": 8}
        model = build(config_for("gpt2", **size, attn_implementation="eager"))
        if tp > 1:
            tp_plugin.parallelize(model, tp_size=tp)
        model.train()
        with LiveBytes(tuple(model.parameters())) as live:
            output = model.transformer(input_ids=torch.zeros(2, 64, dtype=torch.int64), use_cache=False)
            gc.collect()  # what stands in cycles is not kept
            found.append(live.live)
        del output
    return (found[1] - found[0]) / 3


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.full)])
def test_activations_of_a_layer(tp: int) -> None:
    """Korthikanti et al. 2022, table 2: what is whole on each rank otherwise is split, too."""
    whole = run(tp, kept, 1, False)[0]
    both = zip(run(tp, kept, tp, False), run(tp, kept, tp, True), strict=True)
    for split, with_sequence in both:
        assert with_sequence == pytest.approx(whole / tp, rel=0.02)
        # inputs of norms and of blocks: 64 numbers per token each
        assert split > with_sequence + 3 * (1 - 1 / tp) * 2 * 64 * 64 * 4


def trained(change: str) -> tuple[list[float], list[tuple[int, ...]], float]:
    """Run on every rank: losses of two steps, the shapes that norms saw, the distance to the whole model's weights."""
    import tp_plugin
    from tp_plugin.config.keys import ENV_OPTIONS
    from tp_plugin.runtime.start import stop

    stop()
    os.environ[ENV_OPTIONS] = json.dumps({"sequence_parallel": True})
    whole = build(config_for("llama", attention_dropout=0.3 if change == "dropout" else 0.0))
    sharded = copy.deepcopy(whole)
    tp_plugin.parallelize(sharded, tp_size=2)
    shapes: list[tuple[int, ...]] = []
    norm = sharded.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    losses = []
    for model in (whole, sharded):
        model.train()
        if change == "checkpoints":
            model.gradient_checkpointing_enable()
        if change == "reentrant":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            # two forwards of different lengths before one backward, padded to the same length on the ranks
            ids = [torch.randint(3, 97, (2, length), generator=generator) for length in (9, 10)]
            loss = sum(model(input_ids=i, labels=i).loss for i in ids)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    state = sharded.state_dict()
    apart = max((state[name] - tensor).abs().max().item() for name, tensor in whole.state_dict().items())
    return losses, shapes, apart


@pytest.mark.parametrize("change", ["", "checkpoints"])
def test_norms_see_half_of_the_tokens(change: str) -> None:
    for losses, shapes, apart in run(2, trained, change):
        assert set(shapes) == {(2, 5, 48)}, "9 and 10 tokens are 5 a rank"
        assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
        assert apart < 1e-5


def test_reentrant_checkpoints_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"write gradient_checkpointing_kwargs: \{use_reentrant: false\}"):
        run(2, trained, "reentrant")


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("mixtral", r"model\.layers\.0\.mlp\.experts is a mixture of experts, whose router must see all tokens"),
        ("olmo_hybrid", r"linear_attn.* stands outside the blocks and may need more than this rank's tokens"),
    ],
)
def test_what_cannot_be_split_is_refused(model_type: str, message: str) -> None:
    from tp_plugin.cli.models import build as build_on_meta
    from tp_plugin.policy import make_plan, policy_for
    from tp_plugin.policy.stacks import stacks

    config = config_for(model_type)
    model = build_on_meta(config, meta=True)
    with pytest.raises(Exception, match=message):
        stacks(model, make_plan(model, policy_for(config), 2))
