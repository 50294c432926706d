"""Random streams and index checks on accelerators that are not there: their device modules are stubs."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tp_plugin.errors import TPError
from tp_plugin.tensor import generators, rng
from tp_plugin.tensor.device_asserts import has_kernel

CARD = torch.device("xpu", 1)


class Stub:
    """A device module: generators of two cards, kept on the CPU."""

    def __init__(self) -> None:
        self.cards = [torch.Generator().manual_seed(5) for _ in range(2)]

    def of(self, device: Any = "xpu") -> torch.Generator:
        return self.cards[torch.device(device).index or 0]

    def get_rng_state(self, device: Any = "xpu") -> torch.Tensor:
        return self.of(device).get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = "xpu") -> None:
        self.of(device).set_state(state)

    def manual_seed(self, seed: int) -> None:
        raise AssertionError("it is for the current device only")

    def is_initialized(self) -> bool:
        return True


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub, rand, generator = Stub(), torch.rand, torch.Generator
    generators._another.cache_clear()
    with contextlib.ExitStack() as stack:
        replacements: dict[str, Any] = {
            "get_device_module": lambda device=None: stub,
            "Generator": lambda device="cpu": generator(),
            "rand": lambda *shape, device: rand(*shape, generator=None if device.type == "cpu" else stub.of(device)),
        }
        for name, replacement in replacements.items():
            stack.enter_context(unittest.mock.patch.object(torch, name, replacement))
        current = unittest.mock.patch.object(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
        stack.enter_context(current)
        yield stub
    generators._another.cache_clear()


def drawn(device: torch.device, tp_rank: int, start: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """What a region draws, what is drawn in a pause of it, and what is drawn behind it."""
    generator = generators.DefaultGenerator(device)
    generator.set(start)
    region = rng.ShardedRegion("layers.0.mlp", tp_rank)
    region.begin(device)
    inside = torch.rand(4, device=device).tolist()
    region.pause()
    paused = torch.rand(4, device=device).tolist()
    region.resume()
    inside += torch.rand(4, device=device).tolist()
    region.end()
    return inside, paused, torch.rand(4, device=device).tolist()


def test_a_region_draws_from_its_card(stub: Stub) -> None:
    host, other, start = torch.get_rng_state(), stub.cards[0].get_state(), stub.cards[1].get_state()
    ranks = [drawn(CARD, rank, start) for rank in range(2)]
    assert ranks[0][0] != ranks[1][0], "the same masks on both ranks"
    assert ranks[0][1:] == ranks[1][1:], "the replicated stream is one"
    assert drawn(CARD, 1, start) == ranks[1], "recomputed"
    assert torch.equal(torch.get_rng_state(), host) and torch.equal(stub.cards[0].get_state(), other)
    assert [drawn(torch.device("cpu"), rank, start) for rank in range(2)] == ranks
    torch.set_rng_state(host)


def test_a_region_that_draws_nothing_leaves_no_trace(stub: Stub) -> None:
    start, region = stub.cards[1].get_state(), rng.ShardedRegion("layers.0.mlp", 0)
    region.begin(CARD)
    region.end()
    assert torch.equal(stub.cards[1].get_state(), start)


def test_states_are_those_of_the_current_accelerator_too(stub: Stub) -> None:
    before, kept = rng.fingerprint(), rng.snapshot()
    torch.rand(1, device=torch.device("xpu"))
    assert rng.fingerprint() != before
    rng.restore(kept)
    assert rng.fingerprint() == before


def test_compiled_attention_drops_by_its_seed(stub: Stub) -> None:
    from tp_plugin.tensor.compiled_dropout import _Seeded

    start, found = stub.cards[1].get_state(), []
    for _ in range(2):
        with _Seeded(SimpleNamespace(device=CARD), torch.tensor(3)):  # type: ignore[arg-type]
            found.append(torch.rand(4, device=CARD).tolist())
    assert found[0] == found[1]
    assert torch.equal(stub.cards[1].get_state(), start)


def test_a_device_without_states_is_refused_by_name() -> None:
    with (
        unittest.mock.patch.object(torch, "get_device_module", lambda device=None: SimpleNamespace()),
        pytest.raises(TPError, match=r"device type .mtia.: torch\.mtia has no get_rng_state"),
    ):
        rng.ShardedRegion("layers.0.mlp", 0).begin(torch.device("mtia", 0))


@pytest.mark.parametrize("device", ["cuda", "xpu", "mtia", "cpu"])
def test_a_bad_token_id_is_told_by_the_device_where_it_can(device: str) -> None:
    """On CUDA, and where torch has the kernel; elsewhere the host looks."""
    from tp_plugin.mesh.groups import Group
    from tp_plugin.tensor.embedding import VocabularyRows

    told: list[str] = []
    rows = VocabularyRows(8, 0, 4, None, Group("tp", [0], None))
    has_kernel.cache_clear()
    with (
        unittest.mock.patch.object(torch, "_assert_async", lambda valid, message: told.append(message)),
        unittest.mock.patch.object(
            torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: key in ("CUDA", "XPU")
        ),
        FakeTensorMode(),
    ):
        looks = device in ("cpu", "mtia")
        with pytest.raises(DataDependentOutputException) if looks else contextlib.nullcontext():
            rows.local(torch.empty(3, dtype=torch.int64, device=device))
    has_kernel.cache_clear()
    assert told == ([] if looks else ["index out of range in self"])
