"""Collectives under way finish late: nobody reads a result before it was waited for, or writes what is being sent."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import build, config_for
from workers import run
from zoo import fresh

from tp_plugin.mesh import groups
from tp_plugin.mesh.groups import Group


class LateWork:
    """A collective that has run, but whose result is NaN until :meth:`wait`; as a device may be that far behind."""

    def __init__(self, result: torch.Tensor, sent: torch.Tensor, collective: Callable[[torch.Tensor], Any]):
        self.in_place = result.data_ptr() == sent.data_ptr()
        self.result, self.sent, self.before = result, sent, sent.clone()
        collective(result)
        self.found = result.clone()
        result.fill_(torch.nan)
        self.version = result._version

    def wait(self) -> None:
        assert self.result._version == self.version and self.result.isnan().all(), (
            "a result was written before its time"
        )
        assert self.in_place or torch.equal(self.sent, self.before), "what is being sent was overwritten"
        self.result.copy_(self.found)


@contextlib.contextmanager
def late() -> Iterator[list[str]]:
    """Inside, what is started finishes late; yields the operations that were."""
    begun: list[str] = []

    def reduce(tensor: torch.Tensor, async_op: bool = False, own: Any = torch.distributed.all_reduce, **to: Any) -> Any:
        if not async_op:
            return own(tensor, **to)
        begun.append("all_reduce")
        return LateWork(tensor, tensor, lambda result: own(result, **to))

    def into(name: str) -> Callable[..., Any]:
        own = getattr(groups, name)

        def start(result: torch.Tensor, sent: torch.Tensor, async_op: bool = False, **to: Any) -> Any:
            if not async_op:
                return own(result, sent, **to)
            begun.append(name.lstrip("_"))
            return LateWork(result, sent, lambda into: own(into, sent, **to))

        return start

    with contextlib.ExitStack() as patches:
        patches.enter_context(unittest.mock.patch.object(groups.dist, "all_reduce", reduce))
        for name in ("_all_gather", "_reduce_scatter"):
            patches.enter_context(unittest.mock.patch.object(groups, name, into(name)))
        yield begun


def late_case(model_type: str, options: dict[str, Any], checkpoints: bool) -> tuple[set[str], bool]:
    """Run on every rank: what was under way in a training step, and whether it made a difference."""
    import tp_plugin

    found = []
    operations: set[str] = set()
    for finish in (contextlib.nullcontext([]), late()):
        fresh(**options)
        model = tp_plugin.parallelize(build(config_for(model_type, use_cache=False)).train(), tp_size=2)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
        with finish as begun:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        operations |= set(begun)
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    return operations, all(torch.equal(a, b) for a, b in zip(*found, strict=True))


WGRAD = {"all_reduce"}
TOKENS = {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize(
    "model_type, options, checkpoints, expected",
    [
        ("llama", {}, False, WGRAD),
        ("llama", {"fuse": True}, True, WGRAD),
        ("gptj", {}, False, WGRAD),
        ("llama", {"sequence_parallel": True}, False, TOKENS),
        ("llama", {"sequence_parallel": True}, True, {"reduce_scatter"}),
        ("gptj", {"sequence_parallel": True, "fuse": True}, False, {"reduce_scatter"}),
    ],
)
def test_a_step(model_type: str, options: dict[str, Any], checkpoints: bool, expected: set[str]) -> None:
    for operations, equal in run(2, late_case, model_type, options, checkpoints):
        assert expected <= operations and equal


def writing_case(change: str) -> str:
    """Run on every rank: what the test above says of code that does not wait."""
    fresh()
    group = Group("tp", [0, 1], torch.distributed.group.WORLD)
    sent = torch.ones(4)
    with late():
        under_way = group.start_all_gather(sent) if change == "sent" else group.start_all_reduce(sent)
        if change != "nothing":
            sent.mul_(2)
        try:
            under_way.wait()
        except AssertionError as error:
            return str(error).split("\n")[0]
    return ""


@pytest.mark.parametrize(
    "change, message", [("sent", "is being sent was"), ("result", "before its time"), ("nothing", "")]
)
def test_it_notices(change: str, message: str) -> None:
    assert all(message in found and bool(message) == bool(found) for found in run(2, writing_case, change))
