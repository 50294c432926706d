"""QLoRA under ZeRO x TP, against plain DeepSpeed at the same dp."""

from __future__ import annotations

import pytest
from test_zero import compare, ds_config

pytest.importorskip("bitsandbytes")

BASE = ("llama", {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2})


CASES = [
    (1, 2, {"sequence_parallel": True, "checkpointing": True}),
    (2, 0, {}),
    (2, 1, {"compiled": True}),
    (2, 3, {}),
]


@pytest.mark.parametrize("dp, stage, settings", CASES)
def test_qlora(dp: int, stage: int, settings: dict[str, bool]) -> None:
    compare(2, dp, *BASE, ds_config(stage), "qlora", **settings)
