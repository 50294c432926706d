"""ZeRO 0, 1, 2, 3 x TP against plain DeepSpeed at the same dp: losses, norms, weights, bytes."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
import torch
from models import adapted, batch, build, config_for
from workers import run

from tp_plugin.config.keys import ENV_OPTIONS

STEPS, MICRO = 3, 2


def ds_config(stage: int, **changes: Any) -> dict[str, Any]:
    """Small buckets, so that every bucket boundary is crossed; clipping that is active."""
    zero = {"stage": stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 50, "stage3_prefetch_bucket_size": 2000}
    zero |= changes.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }


def plain_again() -> None:
    """Forget the mesh of the case before."""
    import deepspeed
    from deepspeed.utils import groups

    from tp_plugin.runtime.start import stop

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compile, no buffers in /dev/shm
    stop()
    groups.mpu = None


def train(
    tp: int,
    model_type: str,
    overrides: dict[str, Any],
    config: dict[str, Any],
    adapter: str = "",
    seeds: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    **options: bool,
) -> Any:
    """Train with DeepSpeed alone (tp 1) or with the plugin; what this rank saw, and its local weights."""
    import deepspeed

    plain_again()
    os.environ.pop(ENV_OPTIONS, None)
    if options and tp > 1:
        os.environ[ENV_OPTIONS] = json.dumps(options)
    settings = config_for(model_type, **overrides)
    # every rank another model: the leader's of the first TP group is what is trained
    model = build(settings, seed=torch.distributed.get_rank() if seeds and tp > 1 else 0)
    if adapter:
        model = adapted(model, adapter)
    if tp > 1:
        import tp_plugin

        model = tp_plugin.parallelize(model, tp_size=tp)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-6)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if compiled:
        torch._dynamo.reset()
        engine.compile(backend="aot_eager")
    dp_rank = torch.distributed.get_rank() // tp
    losses, norms = [], []
    from counted import ledger

    before = {key: (ledger["count"][key], ledger["bytes"][key]) for key in ledger["count"]}
    for step in range(STEPS):
        for micro in range(MICRO):
            data = batch(settings.vocab_size, seed=100 * step + 10 * micro + dp_rank)
            loss = engine(**data).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    moved = {
        key: (ledger["count"][key] - before.get(key, (0, 0))[0], ledger["bytes"][key] - before.get(key, (0, 0))[1])
        for key in ledger["count"]
    }
    gather = contextlib.nullcontext()
    if config["zero_optimization"]["stage"] == 3:
        gather = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gather:
        weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    layouts = {}
    if tp > 1:
        from tp_plugin.tensor.param_entry import layout_of

        layouts = {name: layout_of(p) for name, p in model.named_parameters()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "weights": weights, "layouts": layouts, "moved": moved}


_plain: dict[Any, Any] = {}


def plain(dp: int, *case: Any) -> list[Any]:
    key = repr((dp, case))
    if key not in _plain:
        _plain[key] = run(dp, train, 1, *case)
    return _plain[key]


def trained_with(settings: dict[str, bool], tp: int, *case: Any) -> Any:
    return train(tp, *case, **settings)


def compare(tp: int, dp: int, *case: Any, **settings: bool) -> list[Any]:
    """Run the case both ways; section 7's limits. ``settings`` change nothing of the numbers."""
    loss, norm, weight = 1e-5, 1e-5, 3e-4
    expected = plain(dp, *case)
    found = run(tp * dp, trained_with, settings, tp, *case)
    for rank, result in enumerate(found):
        wanted = expected[rank // tp]
        assert result["losses"] == pytest.approx(wanted["losses"], rel=loss), f"rank {rank}"
        assert result["norms"] == pytest.approx(wanted["norms"], rel=norm), f"rank {rank}"
        for name, tensor in result["weights"].items():
            layout = result["layouts"][name]
            whole = wanted["weights"][name]
            local = layout.shard(whole, rank % tp) if layout is not None else whole
            assert tensor.shape == local.shape, name
            torch.testing.assert_close(
                tensor, local, rtol=0, atol=weight, msg=lambda text, name=name: f"{name}: {text}"
            )
    return found


LLAMA = ("llama", {"tie_word_embeddings": False})
REPLICATED_KV = ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True})


# in the ordinary run each stage meets each layout, and one of the models
MATRIX = [
    pytest.param(*layout, stage, model, marks=() if usual else pytest.mark.full, id=f"{layout}-{stage}-{name}")
    for stage in (0, 1, 2, 3)
    for layout in ((2, 1), (2, 2), (4, 1))
    for name, model, usual in (
        ("llama", LLAMA, layout == (2, 1) or (layout == (2, 2) and stage in (0, 2))),
        ("kv1-tied", REPLICATED_KV, layout == (4, 1) or (layout == (2, 2) and stage in (1, 3))),
    )
]


@pytest.mark.parametrize("tp, dp, stage, model", MATRIX)
def test_fp32(tp: int, dp: int, stage: int, model: Any) -> None:
    compare(tp, dp, *model, ds_config(stage))


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes(stage: int, dp: int) -> None:
    """The formula of engines/deepspeed/groups.py; nothing in a DP group of one, and no TP traffic because of ZeRO."""
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    config = ds_config(stage, zero=zero if stage == 3 else {})
    found = run(2 * dp, train, 2, *LLAMA, config)
    base = run(2 * dp, train, 2, *LLAMA, ds_config(0))[0]["moved"]
    for result in found:
        sizes = [4 * tensor.numel() for tensor in result["weights"].values()]
        assert all(size % (4 * dp) == 0 for size in sizes)  # no padding in this model
        held = sum(sizes)
        moved = {key: size / STEPS for key, (_, size) in result["moved"].items() if key.endswith("/data") and size}
        expected = {
            0: {"all_reduce/data": held},
            1: {"all_reduce/data": held + 4, "all_gather_into_tensor/data": held / dp},
            2: {"all_reduce/data": MICRO * held + 4, "all_gather_into_tensor/data": held / dp},
            3: {
                "reduce_scatter_tensor/data": MICRO * held,
                "all_gather_into_tensor/data": 2 * MICRO * held / dp,
                "all_reduce/data": 8,
            },
        }[stage]
        assert moved == ({} if dp == 1 else expected)
        of_tp = {key: count for key, (count, _) in result["moved"].items() if key.endswith("/tp")}
        assert of_tp == {key: count for key, (count, _) in base.items() if key.endswith("/tp")}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("tp, dp", [(2, 2), (4, 1)])
def test_offloaded(tp: int, dp: int, stage: int) -> None:
    zero = dict(OFFLOAD)
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    compare(tp, dp, *REPLICATED_KV, ds_config(stage, zero=zero))


OTHERS = {
    ("gpt2", 1), ("gpt2", 3), ("qwen3", 0), ("qwen3", 2), ("gemma2", 2), ("gemma2", 3), ("gpt_oss", 2), ("gpt_oss", 3),
    ("deepseek_v3", 3),
}  # fmt: skip


@pytest.mark.parametrize(
    "model, stage",
    [
        pytest.param(model, stage, marks=() if (model[0], stage) in OTHERS else pytest.mark.full)
        for model in (
            ("gpt2", {}),
            ("qwen3", {}),
            ("gemma2", {"num_key_value_heads": 1}),
            ("gpt_oss", {}),
            ("deepseek_v3", {}),
        )
        for stage in (0, 1, 2, 3)
    ],
)
def test_architectures(stage: int, model: Any) -> None:
    """Conv1D and one matrix at both ends; partial gradients of q/k norms; replicated heads and capped logits."""
    compare(2, 2, *model, ds_config(stage))


@pytest.mark.parametrize("stage", [1, 3])
def test_lora(stage: int) -> None:
    compare(2, 2, *LLAMA, ds_config(stage), "lora")
    compare(4, 1, *REPLICATED_KV, ds_config(stage), "lora")


@pytest.mark.full
@pytest.mark.parametrize("adapter", ["dora", "HiRA"])
def test_other_adapters(adapter: str) -> None:
    """Both read the base's weight outside of its forward, where ZeRO-3 has it in parts, as without a tp_size."""
    compare(2, 2, *LLAMA, ds_config(2), adapter)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2)), 3])
def test_prefix(stage: int) -> None:
    """The prefix stands beside the sharded model, and is partitioned with it."""
    compare(2, 2, *REPLICATED_KV, ds_config(stage), "prefix")


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_start_equal(stage: int) -> None:
    """Whatever each rank's seed: one model in a TP group, and one in all of them."""
    expected = plain(2, *LLAMA, ds_config(stage))
    for rank, result in enumerate(run(4, train, 2, *LLAMA, ds_config(stage), "", True)):
        assert result["losses"] == pytest.approx(expected[rank // 2]["losses"], rel=1e-5)


SETTINGS = {
    "sequence": {"sequence_parallel": True},
    "checkpointing": {"checkpointing": True},
    "sequence-checkpointing": {"sequence_parallel": True, "checkpointing": True},
    "experts": {"expert_parallel": True},
    "fused-head": {"fused_head": True},
    "compiled": {"compiled": True},
}


REST = [pytest.param("compiled", stage, marks=pytest.mark.full) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    "name, stage", [("sequence", 1), ("sequence", 3), ("checkpointing", 3), ("sequence-checkpointing", 2),
                    ("experts", 1), ("experts", 3), ("fused-head", 1), ("fused-head", 3), *REST],
)  # fmt: skip
def test_settings(name: str, stage: int) -> None:
    model = ("mixtral", {}) if name == "experts" else LLAMA
    compare(2, 2, *model, ds_config(stage), **SETTINGS[name])


def generated(tp: int, stage: int) -> list[int]:
    import deepspeed

    import tp_plugin

    plain_again()
    model = build(config_for(LLAMA[0], **LLAMA[1]))
    if tp > 1:
        model = tp_plugin.parallelize(model, tp_size=tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage))
    ids = batch(97, seed=torch.distributed.get_rank() // tp)["input_ids"]
    with torch.no_grad():
        found = engine.module.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2, synced_gpus=stage == 3)
    engine.destroy()
    return found.flatten().tolist()


@pytest.mark.parametrize("stage", [2, 3])
def test_generate(stage: int) -> None:
    expected = run(2, generated, 1, stage)
    assert run(4, generated, 2, stage) == [expected[0], expected[0], expected[1], expected[1]]
    assert expected[0] != expected[1]


def flattened_norm(tp: int) -> tuple[float, float, float]:
    """DeepSpeed's norm of a flat gradient with our mask, our own norm, and its norm without a mask."""
    from deepspeed.runtime.utils import get_flattened_grad_norm

    import tp_plugin
    from tp_plugin.engines.deepspeed.groups import Mpu
    from tp_plugin.engines.deepspeed.norms import _norm_mask
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.grad_norm import total_norm
    from tp_plugin.tensor.param_entry import layout_of

    plain_again()
    settings = config_for(*REPLICATED_KV[:1], **REPLICATED_KV[1])
    model = tp_plugin.parallelize(build(settings), tp_size=tp)
    model(**batch(settings.vocab_size, seed=1)).loss.backward()
    group = list(model.parameters())
    flat = torch.nn.Parameter(torch.zeros(sum(p.numel() for p in group)))
    flat.grad = torch.cat([p.grad.reshape(-1) for p in group])
    mask = _norm_mask(None, None, group)
    norm = get_flattened_grad_norm([flat], mpu=Mpu(require().mesh), grad_norm_mask=[mask])
    bare = get_flattened_grad_norm([flat], mpu=Mpu(require().mesh), grad_norm_mask=[torch.empty(0)])
    return norm, total_norm([p.grad for p in group], [layout_of(p) for p in group], require().mesh).item(), bare


def test_mask_of_the_fused_optimizer() -> None:
    """What DeepSpeed's fused 16-bit optimizer, which needs a GPU, is told to leave out."""
    for norm, ours, bare in run(4, flattened_norm, 4):
        assert norm == pytest.approx(ours, rel=1e-6)
        assert bare > 1.05 * ours


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(stage: int) -> None:
    """Losses and norms in bf16 stay as close to fp32's as plain DeepSpeed's bf16 run does."""
    config = ds_config(stage, bf16={"enabled": True})
    exact = plain(1, *LLAMA, ds_config(2))[0]
    expected = plain(1, *LLAMA, config)[0]
    for tp in (2, 4):
        for result in run(tp, train, tp, *LLAMA, config):
            for key in ("losses", "norms"):
                spread = max(abs(a - b) / b for a, b in zip(expected[key], exact[key], strict=True))
                apart = max(abs(a - b) / b for a, b in zip(result[key], expected[key], strict=True))
                print(stage, tp, key, spread, apart)
                assert apart <= 2 * spread + 2**-9, key
