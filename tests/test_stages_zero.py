"""Pipeline stages under DeepSpeed: ZeRO 0, 1 and 2 against plain DeepSpeed on dp processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapted, batch, build, config_for
from safetensors.torch import load_file
from test_zero import MICRO, STEPS, ds_config, plain_again
from workers import WorkerError, run, sees_whole

from tp_plugin.cli.main import main

OVERRIDES = {"num_hidden_layers": 4}


def engine_of(model: Any, config: dict[str, Any]) -> Any:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-6)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps(engine: Any, data_rank: int, first: int, last: int) -> tuple[list[float], list[float]]:
    """Losses of these steps' micro-batches, and norms of the steps."""
    vocabulary, losses, norms = engine.module.config.vocab_size, [], []
    for step in range(first, last):
        for micro in range(MICRO):
            data = batch(vocabulary, seed=100 * step + 10 * micro + data_rank)
            loss = engine(**data).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return losses, norms


@sees_whole
def case(
    stage: int,
    tp: int,
    pp: int,
    model_type: str,
    adapter: str = "",
    folder: str = "",
    resume: str = "",
    last: int = STEPS,
) -> dict[str, Any]:
    """Train up to step ``last``; ``folder``: save after the first step, and go on; ``resume``: from such a folder."""
    plain_again()
    changes: dict[str, Any] = {}
    model = build(config_for(model_type, **OVERRIDES))
    if adapter:
        model = adapted(model, adapter)
    if tp * pp > 1:
        changes = {"tp_size": tp, "pp_size": pp, "tp_plugin": {"pipeline_microbatches": 2}}
    engine = engine_of(model, ds_config(stage, **changes))
    data_rank = torch.distributed.get_rank() // (tp * pp)
    first = 0
    if resume:
        engine.load_checkpoint(resume)
        first = 1
    losses, norms = steps(engine, data_rank, first, 1)
    if folder:
        engine.save_checkpoint(folder)
    more = steps(engine, data_rank, 1, last)
    weights = {name: torch.tensor(p.detach().float().tolist()) for name, p in model.named_parameters()}
    engine.destroy()
    return {"losses": losses + more[0], "norms": norms + more[1], "weights": weights}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of a resumed run the last steps count."""
    for key in ("losses", "norms"):
        theirs = expected[key][-len(found[key]) :]
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found[key], theirs, strict=True)), (found, theirs)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 2e-5, name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_stages(stage: int) -> None:
    expected = run(2, case, stage, 1, 1, "llama")
    for rank, found in enumerate(run(4, case, stage, 1, 2, "llama")):
        same(found, expected[rank // 2])


@pytest.mark.parametrize(("stage", "model_type"), [(1, "gpt2"), (2, "qwen2")])
def test_two_stages_of_two(stage: int, model_type: str) -> None:
    expected = run(1, case, stage, 1, 1, model_type)
    for found in run(4, case, stage, 2, 2, model_type):
        same(found, expected[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_lora(stage: int) -> None:
    expected = run(1, case, stage, 1, 1, "llama", "lora")
    for found in run(2, case, stage, 1, 2, "llama", "lora"):
        same(found, expected[0])


@pytest.mark.parametrize("stage", [0, 2])
def test_resumed_with_other_sizes(stage: int, tmp_path: Path) -> None:
    """Saved at pp 2 x dp 2, resumed there and at tp 2 x dp 2, and exported; saved at tp 2 x dp 2, resumed at pp 2."""
    expected = run(2, case, stage, 1, 1, "llama")
    folder, other = str(tmp_path / "saved"), str(tmp_path / "saved without stages")
    run(4, case, stage, 1, 2, "llama", "", folder)
    run(4, case, stage, 2, 1, "llama", "", other)
    for tp, pp, saved in ((1, 2, folder), (2, 1, folder), (1, 2, other)):
        for rank, found in enumerate(run(4, case, stage, tp, pp, "llama", "", "", saved)):
            same(found, expected[rank // 2])
    assert main(["export", folder, str(tmp_path / "plain")]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    first = run(2, case, stage, 1, 1, "llama", "", "", "", 1)[0]["weights"]
    assert plain.keys() == first.keys()
    assert max((plain[name].float() - weight).abs().max().item() for name, weight in first.items()) <= 2e-5


def test_zero_3_is_refused() -> None:
    with pytest.raises(WorkerError, match="pp_size: 2 together with ZeRO-3 is not supported"):
        run(2, case, 3, 1, 2, "llama")
