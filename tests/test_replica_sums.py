"""Gradients of which each rank has a part are summed in few buckets, and are whole wherever somebody reads them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from models import adapted, batch, build, config_for
from workers import run

KV1 = {"num_key_value_heads": 1, "num_hidden_layers": 3}


def _model(tp: int = 2, **options: Any) -> Any:
    """Norms whose gradients are summed over all ranks, and key and value heads that two ranks share."""
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    torch_utils.install()
    torch.manual_seed(0)
    model = build(config_for("llama", **KV1)).train()
    options = {"sequence_parallel": True, **options}
    if options.pop("adapter", ""):
        model = adapted(model, "lora").train()
    return parallelize(model, tp, options=RunConfig(tp_size=tp, **options))


def _sums(model: Any) -> list[Any]:
    from tp_plugin.tensor.param_entry import entry_of

    return [(e.replica_sum, p) for p in model.parameters() if (e := entry_of(p)) is not None and e.replica_sum]


def _hold(model: Any, ids: dict[str, Any]) -> torch.Tensor:
    """A loss that uses the first layer only."""
    return model(**ids, output_hidden_states=True, labels=None).hidden_states[1].square().mean()


def _ids(seed: int) -> dict[str, Any]:
    return {name: value for name, value in batch(97, seed).items() if name != "labels"}


def accumulate(model: Any, see: Any) -> None:
    for seed in range(3):
        model(**batch(97, seed)).loss.backward()
        see()


def retain(model: Any, see: Any) -> None:
    loss = model(**batch(97, 0)).loss
    loss.backward(retain_graph=True)
    see()
    loss.backward()
    see()


def some_unused(model: Any, see: Any) -> None:
    model(**batch(97, 0)).loss.backward()
    _hold(model, _ids(1)).backward()
    see()


def returned(model: Any, see: Any) -> None:
    """``torch.autograd.grad`` between two backwards returns whole gradients, and leaves ``.grad`` alone."""
    model(**batch(97, 0)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    see(torch.autograd.grad(model(**batch(97, 1)).loss, trained))
    model(**batch(97, 2)).loss.backward()
    see()


def only_some(model: Any, see: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for seed in range(2):
        model(**batch(97, seed)).loss.backward(inputs=trained[3:12])
        see()


def checkpointed(model: Any, see: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    accumulate(model, see)


def reentrant(model: Any, see: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    accumulate(model, see)


def used_twice(model: Any, see: Any) -> None:
    """Two reentrant checkpoints use the same parameters: each gives a gradient in one backward."""
    from torch.utils.checkpoint import checkpoint

    def loss(scale: torch.Tensor, seed: int) -> torch.Tensor:
        return model(**batch(97, seed)).loss * scale

    scale = torch.ones((), requires_grad=True)
    for _ in range(2):
        parts = [checkpoint(loss, scale, seed, use_reentrant=True) for seed in (1, 2)]
        (parts[0] + 2 * parts[1]).backward()
        see()


def hooked(model: Any, see: Any) -> None:
    """What looks at a gradient during the backward sees the sum."""
    seen: list[torch.Tensor] = []
    for at, (_, parameter) in enumerate(_sums(model)):
        if at % 3 == 0:
            parameter.register_hook(lambda grad: seen.append(grad.clone()))
        elif at % 3 == 1:
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    accumulate(model, see)
    see(seen)


def raised(model: Any, see: Any) -> None:
    """A backward that raises leaves nothing behind that a later one would sum."""
    handle = model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        model(**batch(97, 0)).loss.backward()
    handle.remove()
    model.zero_grad()
    accumulate(model, see)


WAYS = (
    accumulate, retain, some_unused, returned, only_some, checkpointed, reentrant, used_twice, hooked, raised,
)  # fmt: skip


def way_case(way: str, bucket: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """All gradients that ``way`` shows, summed in buckets and one by one in each parameter's hook."""
    from counted import ledger

    from tp_plugin.tensor import replicas

    found: dict[str, Any] = {"grads": [], "counts": []}
    before, replicas.BUCKET = replicas.BUCKET, replicas.BUCKET if bucket is None else bucket
    try:
        for at_once in (True, False):
            model = _model(**options)
            for replica_sum, _ in _sums(model):
                replica_sum.at_once = at_once
            seen: list[Any] = []

            def see(given: Any = None, seen: list[Any] = seen, model: Any = model) -> None:
                tensors = [p.grad for p in model.parameters()] if given is None else given
                seen.extend(None if t is None else t.clone() for t in tensors)

            start = ledger["count"]["all_reduce/tp"]
            globals()[way](model, see)
            found["counts"].append(ledger["count"]["all_reduce/tp"] - start)
            found["grads"].append(seen)
    finally:
        replicas.BUCKET = before
    found["sums"] = sum(p.requires_grad for _, p in _sums(model))
    return found


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_gradients_of_plain_loops(way: str) -> None:
    bucket = 1 if way in ("reentrant", "used_twice") else None  # the second use finds the first on its way
    options = {"sequence_parallel": False} if way == "reentrant" else {}
    for found in run(2, way_case, way, bucket, options):
        one_by_one, bucketed = found["grads"]
        assert len(one_by_one) == len(bucketed) > 10
        for expected, grad in zip(one_by_one, bucketed, strict=True):
            assert (expected is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"adapter": "lora", "sequence_parallel": False}], ids=["sequence", "lora"])
def test_one_collective_per_backward(options: dict[str, Any]) -> None:
    """Of one dtype, and one group, which here is the TP group; as many as fit into a bucket."""
    for found in run(2, way_case, "accumulate", None, options):
        assert found["counts"][0] - found["counts"][1] == 3 * (found["sums"] - 1) > 3 * 5


def early_case() -> list[int]:
    """Collectives that have begun whenever a hook of a layer's input runs, with buckets of one parameter."""
    from counted import ledger

    from tp_plugin.tensor import replicas

    before, replicas.BUCKET = replicas.BUCKET, 1
    try:
        model = _model()
        begun: list[int] = []
        for layer in model.model.layers:
            layer.register_full_backward_hook(lambda *args: begun.append(ledger["count"]["all_reduce/tp"]))
        model(**batch(97, 0)).loss.backward()
        return begun
    finally:
        replicas.BUCKET = before


def test_full_buckets_begin_during_the_backward() -> None:
    for begun in run(2, early_case):
        assert len(begun) == 3 and begun[0] < begun[1] < begun[2]


def ddp_case(settings: dict[str, Any], deferred: bool) -> dict[str, Any]:
    """Two units; in one of them the upper layers go unused every other time."""
    from counted import ledger

    model = _model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **settings)
    if not deferred:
        wrapped.tp_members = []
    unit = torch.distributed.get_rank() // 2
    seen, counts = [], []
    for step in range(4):
        with wrapped.no_sync() if step % 2 == 0 and "static_graph" not in settings else contextlib.nullcontext():
            start = ledger["count"]["all_reduce/tp"]
            if settings.get("find_unused_parameters") and (step + unit) % 3 == 0:
                loss = wrapped(**_ids(step), output_hidden_states=True).hidden_states[1].square().mean()
            else:
                loss = wrapped(**batch(97, 10 * step + unit)).loss
            forward = ledger["count"]["all_reduce/tp"]
            loss.backward()
            counts.append((forward - start, ledger["count"]["all_reduce/tp"] - forward))
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        if step == 1:
            wrapped.zero_grad()
    return {"seen": seen, "counts": counts, "sums": len(_sums(model))}


@pytest.mark.parametrize(
    "settings",
    [{}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}, {"static_graph": True}],
    ids=["usual", "unused", "static"],
)
def test_gradients_under_ddp(settings: dict[str, Any]) -> None:
    expected, found = run(4, ddp_case, settings, False), run(4, ddp_case, settings, True)
    for want, got in zip(expected, found, strict=True):
        for step, (ones, others) in enumerate(zip(want["seen"], got["seen"], strict=True)):
            for one, other in zip(ones, others, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=lambda t, step=step: f"{step} {t}")
        if not settings:
            fewer = [a[1] - b[1] for a, b in zip(want["counts"], got["counts"], strict=True)]
            assert fewer == [want["sums"] - 1] * 4
