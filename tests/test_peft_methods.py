"""PEFT's methods other than LoRA beside sharded linears, against plain PEFT on one process."""

from __future__ import annotations

from typing import Any

import pytest
from adapters import adapter_case, check
from models import build, config_for
from peft_methods import EVEN, LINEARS, METHODS, SMALL
from workers import run, sees_whole

from tp_plugin.config.run_config import RunConfig


def method_case(name: str, tp: int, **options: Any) -> dict[str, Any]:
    import peft

    kind, overrides, own = METHODS[name]
    config = getattr(peft, kind)(target_modules=LINEARS, **own)
    return adapter_case(tp, "llama", overrides, config, RunConfig(tp_size=tp, **options) if options else None)


@pytest.mark.parametrize("name", METHODS)
def test_beside_plain_peft(name: str) -> None:
    check(run(2, method_case, name, 2))


@pytest.mark.parametrize("name", ["VeRA", "OFT", "LoKr"])
def test_four_ranks(name: str) -> None:
    check(run(4, method_case, name, 4))


def split_tokens_case(name: str) -> dict[str, Any]:
    return method_case(name, 2, sequence_parallel=True)


@pytest.mark.parametrize("name", ["IA3", "LoHa", "HiRA"])
def test_sequence_parallel(name: str) -> None:
    """What acts on outputs acts on this rank's tokens; what is beside a linear joins it before the sum."""
    check(run(2, split_tokens_case, name))


@sees_whole
def adalora_case() -> dict[str, Any]:
    import peft

    config = peft.AdaLoraConfig(
        target_modules=LINEARS, init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, lora_dropout=0.1
    )

    def allocate(model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    return adapter_case(2, "llama", SMALL, config, after_step=allocate, looks_whole=True)


def test_adalora() -> None:
    """Its orthogonality is part of the loss, and its importances rank what is pruned."""
    check(run(2, adalora_case))


def refused_case(kind: str, model_type: str = "llama", **settings: Any) -> str:
    import peft

    from tp_plugin.errors import PolicyError
    from tp_plugin.policy import make_plan, policy_for

    config = getattr(peft, kind)(**{"target_modules": ["down_proj"], **settings})
    model = peft.get_peft_model(build(config_for(model_type, **EVEN)), config)
    with pytest.raises(PolicyError) as raised:
        make_plan(model.base_model.model, policy_for(model_type), 2)
    return str(raised.value)


def test_what_stays_out_is_refused_by_name() -> None:
    """Before training, with its reason."""
    rotated = refused_case("BOFTConfig", boft_block_size=4)
    assert "down_proj is wrapped by peft.tuners.boft.layer.Linear, which cannot be sharded: its rotations" in rotated
    assert "LoRA, DoRA and adalora, beft, delora" in rotated
    assert "its reflections mix features of all ranks" in refused_case("HRAConfig")
    assert "is not the derivative of its output" in refused_case("C3AConfig", block_size=24)
    assert "no test proves it" in refused_case("MissConfig", r=4)
    assert "instead of the base layer" in refused_case("ShiraConfig", r=2)
    assert "with rank_dropout, of which no test proves" in refused_case("LoHaConfig", rank_dropout=0.1)
    assert "with module_dropout" in refused_case("LoKrConfig", module_dropout=0.1)
    assert "set coft=False" in refused_case("OFTConfig", coft=True, r=0, oft_block_size=4)
    straddling = refused_case("OFTConfig", r=0, oft_block_size=32)
    assert "has numbers for blocks of 32 features, but ranks' features meet at 48; choose a smaller block" in straddling
    shared = refused_case("OFTConfig", r=0, oft_block_size=32, block_share=True)
    assert "rotates blocks of 32 features, of which some are on two ranks" in shared
    twice = refused_case("GraloraConfig", r=4, gralora_k=2, hybrid_r=2, gralora_dropout=0.1)
    assert "drops its input twice" in twice
    head = refused_case("LoHaConfig", target_modules=["lm_head"])
    assert "only LoRA and DoRA go on a head or an embedding" in head
