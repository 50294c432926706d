"""The guard on a device: what the leader sent is vouched for, the rest is compared one meeting late, and never lost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_device import FakeDevice
from fresh import scripts
from models import batch, build, config_for
from test_parallel import expect, pair, rank
from workers import run

from tp_plugin.runtime.digests import LateDigest, Vouched


def test_what_was_sent_is_vouched_for_until_it_is_written_to() -> None:
    vouched = Vouched()
    first, second = torch.ones(3), torch.ones(3)
    vouched.add([first, second], 7)
    assert vouched.stamp(first) == (7, 0) and vouched.stamp(second) == (7, 1)
    assert vouched.stamp(first[:2]) is None and vouched.stamp(first.clone()) is None
    assert vouched.stamp(torch.ones(3)) is None
    second.add_(1)
    assert vouched.stamp(second) is None
    vouched.add([second], 8)
    assert vouched.stamp(second) == (8, 0)
    del first, second
    gc.collect()
    assert len(vouched._stamps) == 0


def on_device(data: dict[str, torch.Tensor], fake: FakeDevice, stamp: int = 0) -> dict[str, torch.Tensor]:
    """``data`` on the fake device; with a ``stamp`` as a prepared loader brings it there."""
    from tp_plugin.runtime.runtime import require

    fake.claim(*data.values())
    if stamp:
        require().vouched.add(data.values(), stamp)
    return data


def meets_at_forward(sharded: Any, data: Any) -> None:
    sharded(**data)


def meets_at_barrier(sharded: Any, data: Any) -> None:
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    require().sync_points.rendezvous(BARRIER)


def meets_at_gather(sharded: Any, data: Any) -> None:
    from tp_plugin.engines.accelerate import operations

    operations.meet_at("gather", torch.ones(1))


def saves(sharded: Any, data: Any) -> None:
    """The leader asks its peers, wherever they are; and what it raises, they raise."""
    from tp_plugin.runtime.runtime import require

    torch.distributed.barrier()  # both have called backward, as each does sooner or later
    with require().sessions.together("save"):
        assert not sharded.tp_record.mesh.is_leader, "the checkpoint would be written"


MEETINGS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (meets_at_forward, meets_at_barrier, meets_at_gather, saves)
}


def other_batch_case(meeting: str) -> tuple[str, str]:
    _, sharded = pair(2)
    fake = FakeDevice()
    same = on_device(batch(97, 0), fake)
    with fake.running():
        sharded(**same).loss.backward()
        sharded(**on_device(batch(97, seed=rank()), fake))
        with torch.no_grad():
            return expect("another batch", lambda: MEETINGS[meeting](sharded, same)), str(fake.syncs)


@pytest.mark.parametrize("meeting", MEETINGS)
def test_another_batch_is_told_where_the_ranks_meet_next(meeting: str) -> None:
    for message, syncs in run(2, other_batch_case, meeting):
        assert "forward 2, TP group of ranks [0, 1]: the ranks have computed on different batches" in message
        assert "'input_ids' differed (rank 0: torch.int64 [2, 11] checksum " in message
        assert "accelerator.prepare" in message
        assert syncs == "[]", "the host reads copies only"


def other_loss_case(meeting: str, factor: float) -> str:
    _, sharded = pair(2)
    fake = FakeDevice()
    data = on_device(batch(97, 0), fake)
    with fake.running():
        loss = sharded(**data).loss
        (loss * (1 + factor * rank())).backward()
        MEETINGS["meets_at_barrier"](sharded, data) if factor < 1e-4 else None  # rounding, if weights have drifted
        return expect("another loss", lambda: MEETINGS[meeting](sharded, data)) if factor > 1e-4 else ""


@pytest.mark.parametrize("meeting", MEETINGS)
def test_another_loss_is_told_where_the_ranks_meet_next(meeting: str) -> None:
    for message in run(2, other_loss_case, meeting, 0.01):
        assert "called backward() on different losses (rank 0: " in message
    assert run(2, other_loss_case, meeting, 5e-6) == ["", ""]


def drifted_case() -> tuple[int, str]:
    from tp_plugin.errors import DivergenceError

    _, sharded = pair(2)
    fake = FakeDevice()
    fake.claim(*(parameter.detach() for parameter in sharded.parameters()))
    with torch.no_grad():
        sharded.model.norm.weight[3] += 1e-3 * rank()
    with fake.running():
        for count in range(1, 9):
            try:
                sharded(**on_device(batch(97, 0), fake))  # no backward, so that no loss shows it
            except DivergenceError as error:
                return count, str(error)
    return 0, ""


def test_drift_is_told_one_forward_after_the_look() -> None:
    for count, message in run(2, drifted_case):
        assert count == 3 and "'model.norm.weight' has drifted apart" in message


def vouched_case() -> dict[str, Any]:
    _, sharded = pair(2)
    fake = FakeDevice()
    with fake.running(), patch.object(LateDigest, "__init__", side_effect=AssertionError("it was looked at")):
        sharded(**on_device(batch(97, 0), fake, stamp=1)).loss.backward()
    with fake.running():
        # written to on one rank alone, and by nothing: there its content is looked at, and so it is everywhere
        data = on_device(batch(97, 1), fake, stamp=2)
        if rank():
            data["labels"].add_(0)
        sharded(**data).loss.backward()
        # the next batch on one rank: another number tells it at once
        data = on_device(batch(97, 2 + rank()), fake, stamp=3 + rank())
        return {"told": expect("another batch", lambda: sharded(**data)), "loss": 0}


def test_vouched_for() -> None:
    for found in run(2, vouched_case):
        assert (
            "forward 3, TP group of ranks [0, 1]: the ranks are about to compute on different batches" in found["told"]
        )
        assert "'input_ids' differs (rank 0: torch.int64 [2, 11] checksum " in found["told"]


def alone_case() -> str:
    """The leader evaluates alone in between: what is to be compared waits until both meet."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    _, sharded = pair(2)
    fake = FakeDevice()
    with fake.running():
        sharded(**on_device(batch(97, seed=rank()), fake))
        if rank() == 0:
            sharded.eval()
            with torch.no_grad():
                sharded(**on_device(batch(97, 7), fake))
        return expect("another batch", lambda: require().sync_points.rendezvous(BARRIER))


def test_an_evaluation_of_the_leader_alone_loses_nothing() -> None:
    for message in run(2, alone_case):
        assert "forward 1, TP group of ranks [0, 1]: the ranks have computed on different batches" in message


def every_case(guard: int, differs_at: int) -> tuple[int, int, str]:
    """How often inputs were looked at in 7 forwards, the forward that raised, and what."""
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.errors import DivergenceError

    _, sharded = pair(2, options=RunConfig(2, guard=guard))
    looked: list[int] = []
    original = LateDigest.__init__

    def count(self: LateDigest, tensor: torch.Tensor) -> None:
        looked.append(1)
        original(self, tensor)

    with patch.object(LateDigest, "__init__", count):
        for number in range(7):
            try:
                sharded(**batch(97, rank() if number == differs_at else 9)).loss.backward()
            except DivergenceError as error:
                return len(looked), number, str(error)
    return len(looked), -1, ""


@pytest.mark.parametrize(("guard", "forwards"), [(1, 7), (3, 3), (0, 0)])
def test_how_often_inputs_are_looked_at(guard: int, forwards: int) -> None:
    assert run(2, every_case, guard, -1) == [(3 * forwards, -1, "")] * 2


def test_what_is_not_looked_at_passes() -> None:
    assert [found[1] for found in run(2, every_case, 3, 3)] == [3, 3]
    assert [found[1] for found in run(2, every_case, 3, 4)] == [-1, -1]
    assert [found[1] for found in run(2, every_case, 0, 3)] == [-1, -1]


def last_batch(folder: str, differs: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(build(config_for("llama"), 0))
    fake = FakeDevice()
    with fake.running():
        for seed in range(2):
            loss = model(**on_device(batch(97, seed + 5 * differs * seed * rank_of_script()), fake)).loss
            accelerator.backward(loss)
    print("THROUGH", flush=True)


def rank_of_script() -> int:
    return torch.distributed.get_rank()


@pytest.mark.parametrize("differs", [False, True])
def test_the_last_micro_batch_of_a_script_is_compared_at_its_end(differs: bool, tmp_path: Path) -> None:
    for end in scripts(2, last_batch, "", differs, folder=tmp_path):
        assert "THROUGH" in end.said, end.said[-2000:]
        assert end.code == int(differs), end.said[-2000:]
        assert ("at the end of its script: forward" in end.said) == differs
        assert ("the ranks have computed on different batches; 'input_ids' differed" in end.said) == differs


def gathered_case() -> tuple[list[float], str, list[str]]:
    from tp_plugin.engines.accelerate import operations

    pair(2)
    fake = FakeDevice()
    value = torch.tensor([float(rank()), 1.0])
    fake.claim(value)
    with fake.running():
        given = operations.meet_at("gather", value)
        other = torch.zeros(2 + rank())
        fake.claim(other)
        message = expect("other shapes", lambda: operations.meet_at("gather", other))
    return given.tolist(), message, fake.syncs


def test_a_gather_of_a_device_takes_the_leaders_value_unseen() -> None:
    """Trainer gathers the number of items in each batch, while the device has work."""
    for given, message, syncs in run(2, gathered_case):
        assert given == [0.0, 1.0] and "values of different shapes" in message
        assert syncs == []
