"""Shapes and ways of running against one process; every architecture: test_zoo.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import build, config_for
from workers import WorkerError, run
from zoo import fresh

from tp_plugin.cli.parity import compare
from tp_plugin.cli.parity_result import Result
from tp_plugin.policy import policy_for

LAYERS = 2

SHAPES = {
    "kv replicated": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "one kv head a rank": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "no grouping": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "uneven groups": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "uneven replicas": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}),
    "uneven width": ("llama", {"intermediate_size": 75}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd gpt2": ("gpt2", {"n_head": 6, "n_inner": 77}),
    "untied gpt2": ("gpt2", {"tie_word_embeddings": False}),
    "tiny vocabulary": ("llama", {"vocab_size": 5, "pad_token_id": 4}),
    "padding on the second rank": ("llama", {"pad_token_id": 90}),
    "eager attention": ("llama", {"attn_implementation": "eager"}),
}


def parity(model_type: str, overrides: dict[str, Any], tp: int, **options: Any) -> Result:
    """Run on every rank: the largest deviations of the sharded model from a plain one, trained side by side."""
    fresh(**options)
    config = config_for(model_type, **overrides)
    return compare(config, policy_for(config), tp, steps=6)


def assert_parity(results: list[Result]) -> None:
    for result in results:
        assert result.failures() == [], result
        assert result.state and result.generation is not False, result
        assert result.moved > 1e-3, "the weights did not move: nothing was tested"
        assert result.norms == results[0].norms, "ranks clip by different norms"


PLAIN_AT_FOUR = ("no grouping", "tied", "untied gpt2", "padding on the second rank", "eager attention")


def ordinary(name: str, tp: int) -> bool:
    """Four ranks have what two may get wrong, and more; where they have not, two are cheaper."""
    return name == "kv replicated" or (tp == 2) == (name in PLAIN_AT_FOUR)


@pytest.mark.parametrize(
    "name, tp",
    [pytest.param(name, tp, marks=() if ordinary(name, tp) else pytest.mark.full) for tp in (2, 4) for name in SHAPES],
)
def test_shape(name: str, tp: int) -> None:
    model_type, overrides = SHAPES[name]
    assert_parity(run(tp, parity, model_type, overrides, tp))


FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}
FALCON_RW = {"parallel_attn": False, "multi_query": False, "alibi": True}


@pytest.mark.parametrize(
    "model_type, overrides, saved",
    [
        ("stablelm", {"use_parallel_residual": True}, 2),
        ("gpt_neox", {"use_parallel_residual": False}, 0),
        ("falcon", FALCON_40B, 1),
        ("falcon", FALCON_RW, 0),
        ("falcon", {**FALCON_RW, "attn_implementation": "eager"}, 0),
    ],
)
@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.full)])
def test_side_by_side_or_not(model_type: str, overrides: dict[str, Any], saved: int, tp: int) -> None:
    """Whether attention and MLP stand side by side is read from the config."""
    results = run(tp, parity, model_type, overrides, tp)
    assert_parity(results)
    for result in results:
        assert result.collectives.pop("all_reduce/tp") == (4 - saved) * LAYERS + 2, result.collectives


def side_by_side_case(change: str) -> tuple[int, int, float]:
    """Run on every rank: all-reduces of a forward and of its backward, and the distance to the whole model's output."""
    import copy

    from counted import ledger

    import tp_plugin
    from tp_plugin.runtime.start import stop

    stop()
    whole = build(config_for("gptj"))
    sharded = copy.deepcopy(whole)
    tp_plugin.parallelize(sharded, tp_size=2)
    seen: list[list[torch.Tensor]] = [[], []]
    for model, outputs in zip((whole, sharded), seen, strict=True):
        if change == "hook":
            hook = model.transformer.h[0].attn.out_proj.register_forward_hook
            hook(lambda module, args, output, outputs=outputs: outputs.append(output.detach().clone()))
        if change == "copy":
            model = copy.deepcopy(model)
        model.train()
        if change == "dropout":
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.5
        if change == "attention dropout":
            for layer in model.transformer.h:
                layer.attn.attn_dropout.p = 0.5
        for book in ledger.values():
            book.clear()
        logits = model(input_ids=torch.arange(6).view(2, 3)).logits
        forward = ledger["count"]["all_reduce/tp"]
        loss = logits.square().mean()
        until = ledger["count"]["all_reduce/tp"]
        loss.backward()
        outputs.append(loss.detach())
    apart = max((a - b).abs().max().item() for a, b in zip(*seen, strict=True))
    return forward, ledger["count"]["all_reduce/tp"] - until, apart


@pytest.mark.parametrize("change", ["", "hook", "copy", "dropout", "attention dropout"])
def test_when_side_by_side_blocks_sum_their_own(change: str) -> None:
    """A dropout after the sum, or a hook that looks at one block's output: then each block has its own all-reduce."""
    for forward, backward, apart in run(2, side_by_side_case, change):
        first = 2 if change == "dropout" else 1
        hooked = 1 if change == "hook" else 0  # that layer only
        assert forward == first * LAYERS + hooked + 1
        assert backward == LAYERS + 1, "the shared input's gradient is summed once all the same"
        if "dropout" not in change:
            assert apart < 1e-5


def parity_with_experts(model_type: str, overrides: dict[str, Any], tp: int, expert_parallel: bool) -> Result:
    return parity(model_type, overrides, tp, expert_parallel=expert_parallel)


@pytest.mark.parametrize(
    "model_type, expert_parallel, implementation",
    [
        ("mixtral", False, "eager"),
        ("mixtral", True, "batched_mm"),
        ("gpt_oss", False, "batched_mm"),
        ("gpt_oss", True, "eager"),
        pytest.param("mixtral", False, "batched_mm", marks=pytest.mark.full),
        pytest.param("mixtral", True, "eager", marks=pytest.mark.full),
        pytest.param("gpt_oss", False, "eager", marks=pytest.mark.full),
        pytest.param("gpt_oss", True, "batched_mm", marks=pytest.mark.full),
    ],
)
def test_experts_implementation(model_type: str, expert_parallel: bool, implementation: str) -> None:
    overrides = {"experts_implementation": implementation}
    if (model_type, expert_parallel, implementation) == ("gpt_oss", True, "eager"):
        with pytest.raises(WorkerError, match="load the model with experts_implementation='grouped_mm'"):
            run(2, parity_with_experts, model_type, overrides, 2, expert_parallel)
        return
    assert_parity(run(2, parity_with_experts, model_type, overrides, 2, expert_parallel))


def shared_dropout_case() -> list[float]:
    """Losses of the whole and the sharded DeBERTa from equal generators; all dropouts but the probabilities' on."""
    import tp_plugin
    from tp_plugin.cli.models import build
    from tp_plugin.cli.random_batch import loss_of
    from tp_plugin.runtime.start import stop

    stop()
    whole = build(config_for("deberta-v2", hidden_dropout_prob=0.3), meta=False).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    losses = []
    for model in (whole, sharded):
        torch.manual_seed(3)
        losses.append(loss_of(model, 0).item())
    return losses


def test_dropout_of_a_replicated_input_inside_a_block() -> None:
    """The relative positions drop the same for the heads of all ranks, as in one process."""
    for whole, sharded in run(2, shared_dropout_case):
        assert sharded == pytest.approx(whole, rel=1e-5)
