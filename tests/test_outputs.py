"""What a model returns of its layers, if asked: attention weights of all heads, hidden states of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import config_for
from workers import run
from zoo import fresh, model_types, odd_heads

USUAL = ("llama", "gpt2", "codegen", "bert", "t5", "bloom", "deberta-v2", "whisper", "llava")


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All that is returned, less the loss, the logits and caches."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in ("loss", "logits", "past_key_values"):
                yield from tensors(value, f"{path}.{name}")
    elif isinstance(output, (tuple, list)):
        for at, value in enumerate(output):
            yield from tensors(value, f"{path}[{at}]")


def asked(model: torch.nn.Module, **how: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a training forward returns, and the gradients of a loss that is made of all of it."""
    from tp_plugin.cli.random_batch import batch

    torch.manual_seed(3)
    output = model.train()(**batch(model, 0), output_attentions=True, output_hidden_states=True, **how)
    found = dict(tensors(output))
    floats = [t for name, t in found.items() if "attentions" in name or "states" in name or "][" in name]
    sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in floats).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in found.items()}, grads


def returned_case(tp: int, model_type: str, overrides: dict[str, Any], how: dict[str, Any], **options: bool) -> Any:
    from tp_plugin.cli.models import build
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard import parallelize

    fresh()
    config = config_for(model_type, **overrides)
    for each in (config, *(getattr(config, f"{part}_config", None) for part in ("text", "vision"))):
        if each is not None:
            each._attn_implementation = "eager"
    whole, sharded = build(config, meta=False), build(config, meta=False)
    sharded.load_state_dict(whole.state_dict())
    parallelize(sharded, tp, options=RunConfig(tp, **options))
    (expected, grads), (got, local) = (asked(model, **how) for model in (whole, sharded))
    plan, rank = sharded.tp_record.plan, require().mesh.tp.rank
    size = torch.stack([grad.norm() for grad in grads.values()]).norm()
    apart = {
        name: f"{tuple(t.shape)} {tuple(got[name].shape)}"
        if got[name].shape != t.shape
        else ((got[name] - t).norm() / t.norm().clamp_min(1e-9)).item()
        for name, t in expected.items()
    }
    wrong = {
        name: (local[name] - plan.layouts[name].shard(grad, rank)).norm().item() / max(grad.norm(), 1e-2 * size).item()
        for name, grad in grads.items()
    }
    return [sorted(expected), sorted(got), apart, sorted(grads), sorted(local), wrong]


def check(results: list[Any]) -> None:
    for names, seen, apart, learned, learns, wrong in results:
        assert names == seen and learned == learns
        assert any("attentions" in name for name in names) and any("hidden_states" in name for name in names)
        assert {name: far for name, far in apart.items() if isinstance(far, str) or far > 1e-4} == {}
        assert {name: far for name, far in wrong.items() if far > 1e-4} == {}


@pytest.mark.parametrize(
    "model_type", [pytest.param(m, marks=() if m in USUAL else pytest.mark.full) for m in model_types()]
)
def test_layers_are_returned_whole(model_type: str) -> None:
    check(run(2, returned_case, 2, model_type, {}, {}))


@pytest.mark.parametrize("how", [{}, {"return_dict": False}])
def test_heads_that_ranks_do_not_share_evenly(how: dict[str, Any]) -> None:
    results = run(4, returned_case, 4, "llama", odd_heads("llama"), how)
    if how:
        for names, seen, apart, *_, wrong in results:
            assert names == seen and max(apart.values()) <= 1e-4 and max(wrong.values()) <= 1e-4
    else:
        check(results)


SPLIT = ["llama", *(pytest.param(model_type, marks=pytest.mark.full) for model_type in ("gpt2", "bert", "t5", "llava"))]


@pytest.mark.parametrize("model_type", SPLIT)
def test_tokens_that_ranks_share(model_type: str) -> None:
    """Eleven tokens on two ranks, whose norms learn from their own."""
    for results in run(2, split_case, model_type):
        check([results])


def split_case(model_type: str) -> Any:
    return returned_case(2, model_type, {}, {}, sequence_parallel=True)


def after_training_case() -> list[list[int]]:
    """A short input without gradients, as long as a rank's part of the input before."""
    from test_parallel import pair

    from tp_plugin.config.run_config import RunConfig

    _, sharded = pair(2, options=RunConfig(2, sequence_parallel=True))
    ids = torch.arange(3, 15).unsqueeze(0)
    lengths = []
    for tokens, gradients in ((ids, True), (ids[:, :6], False), (ids[:, :1], True)):
        with torch.set_grad_enabled(gradients):
            states = sharded(input_ids=tokens, output_hidden_states=True).hidden_states
        lengths.append([state.shape[1] for state in states])
    return lengths


def test_lengths_of_hidden_states() -> None:
    for lengths in run(2, after_training_case):
        assert lengths == [[12] * 3, [6] * 3, [1] * 3]
