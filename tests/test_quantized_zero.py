"""QLoRA under ZeRO x TP, against plain DeepSpeed at the same dp."""

from __future__ import annotations

import pytest
from test_zero import compare, ds_config

pytest.importorskip("bitsandbytes")

BASE = ("llama", {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2})


@pytest.mark.parametrize("dp, stage", [(1, 2), (2, 0), (2, 1), (2, 3)])
def test_qlora(dp: int, stage: int) -> None:
    compare(2, dp, *BASE, ds_config(stage), "qlora")
