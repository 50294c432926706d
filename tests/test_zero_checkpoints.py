"""DeepSpeed checkpoints: exact resume at the same and at another tp x dp, from and to plain DeepSpeed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from models import batch, build, config_for
from test_zero import LLAMA, REPLICATED_KV, ds_config, plain_again
from transformers import AutoModelForCausalLM
from workers import run

from tp_plugin.cli.export import export
from tp_plugin.cli.reshard import reshard
from tp_plugin.config.keys import ENV_OPTIONS
from tp_plugin.errors import TPError

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


def engine_for(tp, model, stage, lora=False, options=None, **changes):
    import deepspeed

    plain_again()
    os.environ[ENV_OPTIONS] = json.dumps(options or {})
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
    assert engine.save_16bit_model(folder, "whole.bin")
    weights = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    weights = {name: tensor.clone() for name, tensor in (weights or {}).items()}  # replicated ones train on
    result = steps(engine, settings.vocab_size, BEFORE, BEFORE + AFTER, tp)
    engine.destroy()
    if stage:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        recovered = get_fp32_state_dict_from_zero_checkpoint(folder)
        assert recovered.keys() == weights.keys() or not weights
        for name, tensor in weights.items():
            torch.testing.assert_close(recovered[name], tensor.float(), rtol=2**-7, atol=1e-6, msg=name)
    return *result, weights


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


def rest(*values):
    return pytest.param(*values, marks=pytest.mark.full)


WAYS = [((2, 2), (2, 2)), ((1, 2), (2, 1)), ((2, 2), (4, 1)), ((4, 1), (2, 2))]
USUAL = {0: WAYS[2:3], 1: WAYS[:2], 2: WAYS[2:], 3: WAYS[1:3]}


def check(model, stage, tmp_path, source, target, lora=False, tolerance=1e-5, **changes):
    folder = str(tmp_path / "checkpoint")
    (tp, dp), (tp2, dp2) = source, target
    expected = run(tp * dp, uninterrupted, tp, model, stage, lora, changes, folder)[0]
    found = run(tp2 * dp2, resumed, tp2, model, stage, lora, changes, folder)
    for rank, result in enumerate(found):
        assert result[0] == pytest.approx(expected[0], rel=tolerance), f"rank {rank}"
        assert result[1] == pytest.approx(expected[1], rel=tolerance), f"rank {rank}"


@pytest.mark.parametrize(
    "stage, source, target",
    [((stage, *way) if way in USUAL[stage] else rest(stage, *way)) for stage in (0, 1, 2, 3) for way in WAYS],
)
def test_resume(stage, source, target, tmp_path) -> None:
    model = REPLICATED_KV if 4 in (source[0], target[0]) else LLAMA
    check(model, stage, tmp_path, source, target)


@pytest.mark.parametrize("stage, source, target", [(1, (2, 2), (4, 1)), (2, (1, 2), (2, 1)), (3, (2, 2), (4, 1))])
def test_resume_lora(stage, source, target, tmp_path) -> None:
    """Frozen parameters, too, which ZeRO keeps apart."""
    check(LLAMA, stage, tmp_path, source, target, lora=True)


@pytest.mark.parametrize("stage", [0, 1, rest(2), 3])
def test_resume_bf16(stage, tmp_path) -> None:
    """fp32 masters are what is resumed from; one rounding of a bf16 sum may fall differently at another tp."""
    check(LLAMA, stage, tmp_path, (2, 1), (2, 1), bf16={"enabled": True})
    check(LLAMA, stage, tmp_path, (2, 2), (4, 1), tolerance=2e-2, bf16={"enabled": True})


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_offloaded(stage, tmp_path) -> None:
    check(LLAMA, stage, tmp_path, (2, 2), (4, 1), zero={"offload_optimizer": {"device": "cpu"}})


RESHARDED = [(stage, (2, 2), (1, 2)) for stage in (0, 1, 2, 3)]
RESHARDED += [(2, (4, 1), (1, 1)), rest(0, (2, 2), (4, 1)), rest(1, (2, 2), (4, 1)), (3, (2, 2), (4, 1))]
RESHARDED += [(2, (1, 2), (2, 1))]


@pytest.mark.parametrize("stage, source, target", RESHARDED)
def test_reshard(stage, source, target, tmp_path) -> None:
    """The command's result is what the target would have saved: at tp 1, plain DeepSpeed resumes from it."""
    (tp, dp), (tp2, dp2) = source, target
    model = REPLICATED_KV if 4 in (tp, tp2) else LLAMA
    folder, out = tmp_path / "checkpoint", tmp_path / "resharded"
    expected = run(tp * dp, uninterrupted, tp, model, stage, False, {}, str(folder))[0]
    if tp == 1:  # a plain checkpoint does not say which model it holds
        with pytest.raises(TPError, match="does not say which transformers model"):
            reshard(folder, out, None, tp2, dp2)
        return
    reshard(folder, out, None, tp2, dp2)
    ours = run(tp2 * dp2, resumed, tp2, model, stage, False, {}, str(out))
    for result in ours:
        assert result[0] == pytest.approx(expected[0], rel=1e-5)
        assert result[1] == pytest.approx(expected[1], rel=1e-5)


MIXTRAL = ("mixtral", {"num_local_experts": 4, "experts_implementation": "eager", "output_router_logits": False})
BY_EXPERTS = {"expert_parallel": True}


@pytest.mark.parametrize("stage", [3, rest(0), rest(2)])
def test_resume_without_expert_parallel(stage, tmp_path) -> None:
    """A rank then holds as many elements of the experts as before, but others: sizes do not tell, layouts do."""
    saved, again, out = (str(tmp_path / name) for name in ("plain", "experts", "resharded"))
    expected = run(4, uninterrupted, 1, MIXTRAL, stage, False, {}, saved)[0]
    parallel = run(4, uninterrupted, 2, MIXTRAL, stage, False, {"options": BY_EXPERTS}, again)[0]
    assert parallel[0] == pytest.approx(expected[0], rel=1e-5)
    for options in ({}, BY_EXPERTS):
        for rank, result in enumerate(run(4, resumed, 2, MIXTRAL, stage, False, {"options": options}, again)):
            assert result[0] == pytest.approx(expected[0], rel=1e-5), f"rank {rank}, {options}"
            assert result[1] == pytest.approx(expected[1], rel=1e-5), f"rank {rank}, {options}"
    reshard(tmp_path / "experts", tmp_path / "resharded", None, 4, 1)
    sidecar = json.loads(next((tmp_path / "resharded").glob("*/tp_plugin.json")).read_text())
    assert sidecar["tp_plugin"] == BY_EXPERTS
    experts = [layout for name, layout in sidecar["layouts"].items() if name.endswith("experts.down_proj")]
    assert experts and all(layout["dim"] == 0 and len(layout["shape"]) == 3 for layout in experts)
    for result in run(4, resumed, 4, MIXTRAL, stage, False, {"options": BY_EXPERTS}, out):
        assert result[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("stage, tp, dp", [(0, 4, 1), (1, 2, 2), (2, 4, 1), (3, 2, 2)])
def test_whole_weights(stage, tp, dp, tmp_path) -> None:
    """Consolidated, exported and 16-bit weights are the whole model's; transformers reloads them without a word."""
    folder, out = tmp_path / "checkpoint", tmp_path / "exported"
    weights = run(tp * dp, uninterrupted, tp, REPLICATED_KV, stage, False, {}, str(folder))[0][2]
    whole = torch.load(folder / "whole.bin", weights_only=True)
    export(folder, out, None, "float32", 50_000)  # several files
    assert len(list(out.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="float32")
    assert not any(info.values()), info
    reloaded = model.state_dict()
    assert set(weights) == set(reloaded) == set(whole)
    for name, tensor in reloaded.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0, msg=name)
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0, msg=name)


def test_damaged(tmp_path) -> None:
    """A missing or truncated file is named; nothing half-written is left."""
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    run(2, uninterrupted, 2, LLAMA, 2, False, {}, str(folder))
    tag = next(folder.glob("global_step*"))
    victim = tag / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    for command in (lambda: export(folder, out, None, "float32", 10**9), lambda: reshard(folder, out, None, 1, None)):
        with pytest.raises(TPError, match=r"mp_rank_01_optim_states.pt cannot be read .* truncated"):
            command()
    victim.unlink()
    with pytest.raises(TPError, match=r"is not complete: zero_pp_rank_0_mp_rank_01_optim_states.pt is missing"):
        reshard(folder, out, None, 1, None)
    with pytest.raises(TPError, match="no checkpoint 'other'"):
        reshard(folder, out, "other", 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
