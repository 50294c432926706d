"""The dropout masks of one process: models with the dropouts that they have by default, beside one process."""

from __future__ import annotations

from typing import Any

import pytest
from models import config_for
from test_parity import assert_parity
from workers import run
from zoo import fresh

from tp_plugin.cli.parity import compare
from tp_plugin.cli.parity_result import Result
from tp_plugin.policy import policy_for

GPT2 = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


def parity(model_type: str, overrides: dict[str, Any], tp: int, **options: Any) -> Result:
    """Run on every rank: the largest deviations of the sharded model from a plain one, trained side by side."""
    fresh(**options)
    config = config_for(model_type, **overrides)
    return compare(config, policy_for(config), tp, steps=4)


@pytest.mark.parametrize("overrides", [{}, {"attn_implementation": "eager"}])
def test_gpt2(overrides: dict[str, Any]) -> None:
    assert_parity(run(2, parity, "gpt2", GPT2 | overrides, 2))
