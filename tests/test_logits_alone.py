"""Logits that some ranks of a TP group read alone, while the others have gone on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import losses
import pytest
import torch
from models import batch, build, config_for
from torch import nn
from workers import run


def _models() -> tuple[Any, nn.Module, nn.Module]:
    import tp_plugin
    from tp_plugin.policy import policy_for
    from tp_plugin.runtime.start import stop

    stop()
    config = config_for("llama")
    sharded, plain = build(config), build(config)
    tp_plugin.parallelize(sharded, tp_size=torch.distributed.get_world_size(), policy=policy_for(config))
    return config, sharded, plain


def _forward(model: nn.Module, config: Any, step: int, labels: bool = True) -> Any:
    data = batch(config.vocab_size, step)
    if not labels:
        del data["labels"]
    return model(**data)


READS: dict[str, Callable[[Any], Any]] = {
    "columns": lambda outputs: outputs.logits[0, -1, :7].tolist(),
    "printed": lambda outputs: str(outputs.logits),
    "argmax": lambda outputs: outputs.logits.argmax(-1).tolist(),
    "second output": lambda outputs: outputs[1].detach().cpu().numpy().sum().item(),
    "own loss": lambda outputs: losses.causal(outputs.logits).item(),
    "log-probabilities": lambda outputs: losses.log_probabilities(outputs.logits[:, :7]).item(),
    "twice": lambda outputs: [outputs.logits.mean().item(), outputs.logits.std().item()],
}


def _near(found: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return found.split("grad_fn")[0] == expected.split("grad_fn")[0] or len(found) == len(expected)
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def alone_case(reader: int, when: str, late: int) -> list[tuple[str, Any, Any]]:
    """One rank reads; the others go straight on. ``late``: the rank that comes some time after the others."""
    config, sharded, plain = _models()
    rank, seen = torch.distributed.get_rank(), []

    def look(name: str, outputs: Any, expected: Any) -> None:
        if rank == late:
            time.sleep(0.1)
        if rank == reader:
            found = READS[name](outputs)
            seen.append((name, found, READS[name](expected)))

    for step, name in enumerate(READS):
        if when == "evaluation":
            with torch.no_grad():
                outputs, expected = (_forward(model.eval(), config, step) for model in (sharded, plain))
                look(name, outputs, expected)
            continue
        outputs, expected = (_forward(model.train(), config, step) for model in (sharded, plain))
        if when == "before the backward":
            look(name, outputs, expected)
        outputs.loss.backward()
        if when == "after the backward":
            look(name, outputs, expected)
    torch.distributed.barrier()
    grads = {name: p.grad for name, p in sharded.named_parameters()}
    assert when == "evaluation" or all(grad is not None for grad in grads.values())
    return seen


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("reader", [0, 1])
@pytest.mark.parametrize("when", ["before the backward", "after the backward", "evaluation"])
def test_one_rank_reads_alone(when: str, reader: int, late: int) -> None:
    results = run(2, alone_case, reader, when, late)
    assert [len(seen) for seen in results] == [len(READS) * (rank == reader) for rank in range(2)]
    for name, found, expected in results[reader]:
        assert _near(found, expected), (name, found, expected)


def some_alone_case() -> list[Any]:
    """The leader reads something first, then all read: operations of one kind and of another, three ranks and more."""
    config, sharded, plain = _models()
    rank, seen = torch.distributed.get_rank(), []
    for step in range(3):
        outputs, expected = (_forward(model.train(), config, step) for model in (sharded, plain))
        if rank == 0:
            seen.append((outputs.logits.argmax(-1), expected.logits.argmax(-1)))
        if rank in (1, 3):
            seen.append((outputs.logits.sum(), expected.logits.sum()))
        for logits in (outputs.logits,):
            seen.append((logits.argmax(-1), expected.logits.argmax(-1)))
            seen.append((logits.logsumexp(-1), expected.logits.logsumexp(-1)))
        (outputs.loss + outputs.logits[:, -1].pow(2).mean()).backward()
        (expected.loss + expected.logits[:, -1].pow(2).mean()).backward()
    record = sharded.tp_record
    for name, parameter in plain.named_parameters():
        own = record.plan.layouts[name].shard(parameter.grad, rank)
        seen.append((sharded.get_parameter(name).grad, own))
    return [bool(torch.allclose(found.double(), want.double(), rtol=1e-3, atol=1e-5)) for found, want in seen]


def test_some_ranks_read_more() -> None:
    for found in run(4, some_alone_case):
        assert all(found), found


def barrier_case() -> float:
    """The others wait in a barrier of torch itself, of which the plugin knows nothing."""
    from tp_plugin.runtime import remote_logits

    config, sharded, plain = _models()
    before, remote_logits.PATIENCE = remote_logits.PATIENCE, 60
    outputs, expected = (_forward(model.train(), config, 0) for model in (sharded, plain))
    started = time.monotonic()
    if torch.distributed.get_rank() == 0:
        assert torch.allclose(outputs.logits, expected.logits, atol=1e-5)
    torch.distributed.barrier()
    outputs.loss.backward()
    remote_logits.PATIENCE = before
    return time.monotonic() - started


def test_others_wait_elsewhere() -> None:
    assert max(run(2, barrier_case)) < 30


def slow_case() -> list[bool]:
    """A rank that comes too late to an operation finds the others gone on, and does it alone as well."""
    from tp_plugin.runtime import remote_logits

    config, sharded, plain = _models()
    before, remote_logits.PATIENCE = remote_logits.PATIENCE, 0.1
    seen = []
    for late in (0, 1):
        outputs, expected = (_forward(model.train(), config, late) for model in (sharded, plain))
        if torch.distributed.get_rank() == late:
            time.sleep(1)
        seen.append(torch.allclose(outputs.logits.logsumexp(-1), expected.logits.logsumexp(-1), atol=1e-5))
        outputs.loss.backward()
    remote_logits.PATIENCE = before
    return seen


def test_one_comes_late() -> None:
    assert run(2, slow_case) == [[True, True], [True, True]]


def other_arguments_case() -> list[bool]:
    """The leader does to the logits first what the others do not, by the same function."""
    config, sharded, plain = _models()
    seen = []
    for step in range(2):
        outputs, expected = (_forward(model.train(), config, step) for model in (sharded, plain))
        for divisor in (2.0, 3.0) if torch.distributed.get_rank() == 0 else (3.0,):
            found, want = ((logits / divisor).logsumexp(-1) for logits in (outputs.logits, expected.logits))
            seen.append(torch.allclose(found, want, atol=1e-5))
        outputs.loss.backward()
    return seen


def test_the_same_function_of_something_else() -> None:
    assert run(2, other_arguments_case) == [[True] * 4, [True] * 2]


def gone_case() -> str:
    """Read on one rank, a step after the others have dropped them."""
    config, sharded, _ = _models()
    outputs = _forward(sharded.train(), config, 0)
    kept = outputs.logits if torch.distributed.get_rank() == 0 else None
    outputs.loss.backward()
    del outputs
    _forward(sharded, config, 1).loss.backward()
    message = ""
    if kept is not None:
        try:
            kept.sum().item()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    return message


def test_logits_that_others_dropped() -> None:
    message, _ = run(2, gone_case)
    assert message.startswith("DivergenceError") and "Read them on every rank" in message, message


def function_case() -> list[Any]:
    """A function that reads on one rank and returns the loss: the other's logits are out of scope at once."""
    config, sharded, plain = _models()
    rank, seen = torch.distributed.get_rank(), []

    def loss_of(step: int) -> torch.Tensor:
        outputs = _forward(sharded.train(), config, step)
        if rank == 0:
            time.sleep(0.05)
            seen.append(torch.allclose(outputs.logits, _forward(plain.train(), config, step).logits, atol=1e-5))
        return outputs.loss

    for step in range(3):
        loss_of(step).backward()
    return seen


def test_others_have_left_the_function() -> None:
    assert run(2, function_case) == [[True, True, True], []]


def kept_memory_case() -> tuple[int, int]:
    """Logits that a script drops are held for slower peers only until the ranks have met."""
    from tp_plugin.runtime.runtime import require

    config, sharded, _ = _models()
    outputs = _forward(sharded.train(), config, 0)
    loss = outputs.loss
    del outputs
    deferred = require().mesh.context.deferred
    held = len(deferred.before())
    loss.backward()
    return held, len(deferred.before())


def test_dropped_logits_are_let_go() -> None:
    assert run(2, kept_memory_case) == [(1, 0), (1, 0)]
