"""What a script reads and writes of what ZeRO keeps elsewhere looks whole: gathered weights, fp32 copies, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from test_zero import LLAMA, ds_config, plain_again
from workers import run, sees_whole


@sees_whole
def gathered_case(stage: int) -> dict[str, Any]:
    """A script that reads and writes weights under ZeRO, as DeepSpeed's documentation says; the plain model beside."""
    import deepspeed
    from deepspeed import utils

    import tp_plugin
    from tp_plugin.errors import TPError

    plain_again()
    name = "model.layers.0.self_attn.k_proj.weight"  # one head, which both ranks hold
    found: dict[str, Any] = {}
    plain = build(config_for(LLAMA[0], **LLAMA[1]))
    model = tp_plugin.parallelize(copy.deepcopy(plain), tp_size=2)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config(stage, gradient_accumulation_steps=1)
    )
    weight, whole = model.get_parameter(name), plain.get_parameter(name)
    embedding, its_whole = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
    with deepspeed.zero.GatheredParameters([weight, embedding], modifier_rank=0), torch.no_grad():
        found["shape"] = tuple(weight.shape), tuple(whole.shape)
        found["norm"] = weight.norm().item(), whole.norm().item()
        for one in (embedding, its_whole):
            one[-3:] = one[:-3].mean(0)
            one.mul_(2)
        if torch.distributed.get_rank() == 0:
            with pytest.raises(TPError, match="On the main process alone"):
                embedding[3] = 0
    with deepspeed.zero.GatheredParameters([embedding]):
        found["written"] = torch.equal(embedding.data, its_whole.data)
    plain(**batch(97, 0)).loss.backward()
    with torch.no_grad():
        embedding_of_plain = its_whole.detach().clone()
    loss = engine(**batch(97, 0)).loss
    engine.backward(loss)
    grad = utils.safe_get_full_grad(weight)
    found["gradient"] = grad.norm().item(), whole.grad.norm().item(), tuple(grad.shape)
    master = utils.safe_get_full_fp32_param(weight)
    found["master"] = master.norm().item()
    utils.safe_set_full_fp32_param(weight, torch.ones(whole.shape))
    found["set"] = utils.safe_get_full_fp32_param(weight).sum().item(), whole.numel()
    assert embedding_of_plain.isfinite().all()
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_script_that_gathers_sees_whole_weights(stage: int) -> None:
    for found in run(2, gathered_case, stage):
        assert found["written"]
        assert found["shape"][0] == found["shape"][1] == found["gradient"][2]
        assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-6)
        assert found["gradient"][0] == pytest.approx(found["gradient"][1], rel=1e-5)
        assert found["set"][0] == found["set"][1]
