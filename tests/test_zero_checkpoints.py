"""DeepSpeed checkpoints: exact resume at the same and at another tp x dp, from and to plain DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from models import batch, build, config_for
from test_zero import LLAMA, REPLICATED_KV, ds_config, plain_again
from workers import run

BEFORE, AFTER = 2, 3


def steps(engine, vocabulary, first, last, tp):
    """Train; ``dp`` ranks share six samples per step, so that the size of dp does not change the numbers."""
    dp_rank, dp = torch.distributed.get_rank() // tp, torch.distributed.get_world_size() // tp
    losses, norms = [], []
    for step in range(first, last):
        data = batch(vocabulary, seed=step, size=4)
        data["attention_mask"] = torch.ones_like(data["attention_mask"])  # equal tokens: the mean is over all samples
        data["labels"] = data["input_ids"].clone()
        share = 4 // dp
        mine = {k: v[dp_rank * share : (dp_rank + 1) * share] for k, v in data.items()}
        loss = engine(**mine).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / (tp * dp))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return losses, norms


def engine_for(tp, model, stage, lora=False, **changes):
    import deepspeed

    plain_again()
    settings = config_for(model[0], **model[1])
    net = build(settings)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        net = get_peft_model(net, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if tp > 1:
        import tp_plugin

        net = tp_plugin.parallelize(net, tp_size=tp)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, eps=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    dp = torch.distributed.get_world_size() // tp
    config = ds_config(stage, **changes)
    config |= {"train_micro_batch_size_per_gpu": 4 // dp, "gradient_accumulation_steps": 1}
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine, settings


def uninterrupted(tp, model, stage, lora, changes, folder):
    """A run that saves in the middle and goes on."""
    engine, settings = engine_for(tp, model, stage, lora, **changes)
    steps(engine, settings.vocab_size, 0, BEFORE, tp)
    engine.save_checkpoint(folder, client_state={"mine": 7})
    result = steps(engine, settings.vocab_size, BEFORE, BEFORE + AFTER, tp)
    engine.destroy()
    return result


def resumed(tp, model, stage, lora, changes, folder):
    """A fresh run that loads and goes on."""
    engine, settings = engine_for(tp, model, stage, lora, **changes)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.data.mul_(1.5)  # nothing of the fresh weights may survive
    path, client = engine.load_checkpoint(folder)
    assert path is not None and client["mine"] == 7
    assert engine.global_steps == BEFORE
    result = steps(engine, settings.vocab_size, BEFORE, BEFORE + AFTER, tp)
    engine.destroy()
    return result


WAYS = [((2, 1), (2, 1)), ((2, 2), (2, 2)), ((2, 2), (1, 2)), ((2, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (4, 1))]
WAYS += [((4, 1), (2, 2)), ((1, 1), (4, 1))]


def check(model, stage, tmp_path, source, target, lora=False, tolerance=1e-5, **changes):
    folder = str(tmp_path / "checkpoint")
    (tp, dp), (tp2, dp2) = source, target
    expected = run(tp * dp, uninterrupted, tp, model, stage, lora, changes, folder)[0]
    found = run(tp2 * dp2, resumed, tp2, model, stage, lora, changes, folder)
    for rank, result in enumerate(found):
        assert result[0] == pytest.approx(expected[0], rel=tolerance), f"rank {rank}"
        assert result[1] == pytest.approx(expected[1], rel=tolerance), f"rank {rank}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("source, target", [way for way in WAYS if way[1][0] > 1])
def test_resume(stage, source, target, tmp_path) -> None:
    model = REPLICATED_KV if 4 in (source[0], target[0]) else LLAMA
    check(model, stage, tmp_path, source, target)
