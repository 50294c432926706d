"""The dropout masks of one process: models with the dropouts that they have by default, beside one process.

Every architecture: test_zoo.py; LoRA: test_lora.py; one region by itself: test_whole_masks.py.
"""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import test_fsdp2 as fsdp2
import test_zero as zero
from models import config_for
from test_parity import assert_parity
from workers import run
from zoo import fresh

import tp_plugin
from tp_plugin.cli import parity
from tp_plugin.cli.models import build
from tp_plugin.cli.parity_result import Result
from tp_plugin.cli.random_batch import loss_of
from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.policy import policy_for
from tp_plugin.tensor.whole_masks import WholeMasks

GPT2 = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
BERT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "attn_implementation": "eager"}
BART = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
TOKENS = {"sequence_parallel": True}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_dropout": 0.1}


def case(model_type: str, overrides: dict[str, Any], tp: int, checkpoints: dict[str, bool], options: Any) -> Result:
    """Run on every rank: the largest deviations of the sharded model from a plain one, trained side by side."""
    fresh(**options)
    config = config_for(model_type, **overrides)

    def checkpointed(config: Any, meta: bool) -> Any:
        model = build(config, meta=meta)
        if checkpoints:
            model.gradient_checkpointing_enable(checkpoints)
        return model

    with unittest.mock.patch.object(parity, "build", checkpointed):
        return parity.compare(config, policy_for(config), tp, steps=4)


MODELS = {
    "gpt2": (2, "gpt2", GPT2, {}, {}),
    "bert, eager": (2, "bert", BERT, {}, {}),
    "opt": (2, "opt", {"dropout": 0.1, "attention_dropout": 0.1}, {}, {}),
    "bart": (2, "bart", BART, {}, {}),
    "recomputed opt": (2, "opt", {"dropout": 0.1, "attention_dropout": 0.1}, {"use_reentrant": False}, {}),
    "recomputed bart, reentrant": (2, "bart", BART, {"use_reentrant": True}, {}),
    "recomputed": (2, "gpt2", GPT2, {"use_reentrant": False}, {}),
    "recomputed, reentrant": (2, "gpt2", GPT2, {"use_reentrant": True}, {}),
    "tokens of opt": (2, "opt", {"dropout": 0.1, "attention_dropout": 0.1}, {"use_reentrant": False}, TOKENS),
    "tokens": (2, "gpt2", GPT2, {"use_reentrant": False}, TOKENS),
    "tokens of bert": (2, "bert", BERT, {}, TOKENS),
    "uneven heads": (4, "gpt2", {**GPT2, "n_head": 6, "n_inner": 77}, {}, {}),
    "replicated keys": (4, "llama", GROUPED, {}, {}),
    "t5": (4, "t5", {"dropout_rate": 0.1, "num_heads": 6, "d_ff": 77}, {}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str) -> None:
    tp, model_type, overrides, checkpoints, options = MODELS[name]
    assert_parity(run(tp, case, model_type, overrides, tp, checkpoints, options))


def quiet_case() -> tuple[int, int]:
    """How often a mode is put on the stack in a training step without dropout, and in an evaluation with it."""
    counted = []
    for overrides in ({}, GPT2):
        fresh()
        model = tp_plugin.parallelize(build(config_for("gpt2", **overrides), meta=False), tp_size=2)
        model.train(not overrides)
        with unittest.mock.patch.object(WholeMasks, "begin") as begin:
            loss_of(model, 0).backward()
        counted.append(begin.call_count)
    return counted[0], counted[1]


def test_without_dropout_nothing_looks() -> None:
    assert run(2, quiet_case) == [(0, 0)] * 2


def test_sharded_draws_others() -> None:
    """The option; what is dropped between the blocks is one process' all the same."""
    options = {"dropout": "sharded"}
    for result in run(2, case, "gpt2", GPT2, 2, {}, options):
        assert result.loss > 1e-4, "the masks are one process', which this option does not promise"
    outside = {**GPT2, "attn_pdrop": 0.0}
    assert_parity(run(2, case, "gpt2", outside, 2, {}, options))


def test_the_option() -> None:
    assert RunConfig.parse(2).dropout == "exact"
    assert RunConfig.parse(2, {"dropout": "sharded"}).as_written().options == {"dropout": "sharded"}
    with pytest.raises(TPError, match=r"tp_plugin\.dropout: expected one of exact, sharded, found 'own' in a\.yaml"):
        RunConfig.parse(2, {"dropout": "own"}, "a.yaml")
    with pytest.raises(TPError, match="did you mean `dropout`"):
        RunConfig.parse(2, {"dropuot": "exact"})


def test_zero_2() -> None:
    zero.compare(2, 1, "gpt2", GPT2, zero.ds_config(2))


def test_fsdp2() -> None:
    fsdp2.compare(2, 1, "gpt2", GPT2, {}, True)
