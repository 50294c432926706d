"""The loss on a device: few launches, little memory, and Triton kernels that compute what the reference does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import unittest.mock
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import losses
import pytest
import torch
import torch.nn.functional as F
from memory import LiveBytes
from test_vocab_loss import Pair
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.loss.loss_utils import ForCausalLMLoss
from workers import run, stop_all

from tp_plugin.tensor.vocab import blocks, kernels

BUDGET = 40
"""Launches of head and loss in one direction."""


@pytest.fixture(scope="module", autouse=True)
def own_ranks() -> None:
    """What is counted must not depend on what other files' cases have left in the ranks that they share."""
    stop_all()


class Launches(TorchDispatchMode):
    """Counts what launches a kernel: no views, no allocations, no collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aliases = [each.alias_info for each in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        result = func(*args, **(kwargs or {}))
        is_computed = isinstance(result, torch.Tensor) and not is_view and "empty" not in func.__name__
        if func.namespace == "aten" and is_computed:
            self.count[func.__name__] += 1
        return result


class Kernels:
    """In place of the Triton module: one launch each, without temporaries."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def row_statistics(self, block: torch.Tensor, labels: Any, first: int, found: torch.Tensor) -> None:
        self._launch("row_statistics", kernels.row_statistics, block, labels, (first, first + block.shape[1]), found)

    def statistics_gradient(self, block: torch.Tensor, *per_row_first_out: Any) -> None:
        *per_row, first, out = per_row_first_out
        columns = (first, first + block.shape[1])
        of = kernels.statistics_gradient
        out.copy_(self._launch("statistics_gradient", of, block, *per_row, columns=columns, dtype=out.dtype))

    def _launch(self, name: str, reference: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        with _disable_current_modes(), unittest.mock.patch.object(kernels, "triton_for", lambda kind: None):
            return reference(*args, **kwargs)


def as_device(stub: Kernels | None = None) -> Any:
    """Take the CPU for a device, on which ``stub`` is Triton."""
    return unittest.mock.patch.multiple(blocks, on_device=lambda device: True), unittest.mock.patch.object(
        kernels, "triton_for", lambda kind: stub
    )


def causal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(logits, labels, logits.shape[-1])


def of_a_batch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=torch.tensor(23))


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def budget_case(dtype: torch.dtype, with_triton: bool, vocabulary: int, least: int) -> dict[str, Any]:
    pair, stub, found = Pair(2, vocabulary, dtype, hidden=8), Kernels() if with_triton else None, {}
    local = dtype.itemsize * 2 * 256 * pair.split.out_features
    device, triton = as_device(stub)
    sizes = unittest.mock.patch.object(blocks, "ON_DEVICE", blocks.ON_DEVICE._replace(least=least))
    with device, triton, sizes:
        for loss_of in (causal, smoothed):  # they find dtypes out, once a process
            loss_of(pair.split(pair.input((2, 2))), torch.ones(2, 2, dtype=torch.long))
        if stub is not None:
            stub.calls.clear()
        for loss_of in (causal, of_a_batch, smoothed):
            # of a view: a leaf copies its gradient for as long as gloo's thread holds what it has reduced
            counts, x = [], pair.input((2, 256)).view(2, 256, -1)
            labels = torch.randint(vocabulary, (2, 256)).masked_fill_(torch.rand(2, 256) < 0.1, -100)
            pair.split.zero_grad()
            with LiveBytes((pair.split.weight, pair.split.bias)) as bytes_:
                with Launches() as launches:
                    loss = loss_of(pair.split(x), labels)
                counts.append(launches.count)
                with Launches() as launches:
                    loss.backward()
                counts.append(launches.count)
            found[loss_of.__name__] = *counts, bytes_.peak / local
    return {"of": found, "calls": {} if stub is None else dict(stub.calls)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_and_memory_with_kernels(dtype: torch.dtype) -> None:
    """However large the logits are."""
    for found in run(2, budget_case, dtype, True, 16000, 0):
        assert found["calls"]["row_statistics"] == 3
        for name, (forward, backward, peak) in found["of"].items():
            assert forward.total() <= BUDGET and backward.total() <= BUDGET, (name, str(forward), str(backward))
            assert peak <= 1.2, (name, peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_the_reference(dtype: torch.dtype) -> None:
    """Where logits are small, there is one block of them on a device."""
    for found in run(2, budget_case, dtype, False, 2001, blocks.ON_DEVICE.least):
        for name, (forward, backward, _) in found["of"].items():
            assert forward.total() <= BUDGET and backward.total() <= BUDGET, (name, str(forward), str(backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_reference(dtype: torch.dtype) -> None:
    for found in run(2, budget_case, dtype, False, 16001, 0):
        for name, (_, _, peak) in found["of"].items():
            assert peak <= 1.2, (name, peak)


def numbers_case(tp: int, vocabulary: int) -> tuple[dict[str, dict[str, float]], Counter[str]]:
    pair, stub = Pair(tp, vocabulary), Kernels()
    device, triton = as_device(stub)
    with device, triton:
        return {of.__name__: pair.apart(of) for of in (*losses.LOCAL, *losses.WHOLE)}, stub.calls


@pytest.mark.parametrize("tp, vocabulary", [(2, 97), (4, 5)])
def test_numbers_with_kernels(tp: int, vocabulary: int) -> None:
    """Labels, columns and weights are handed to them as they are to the reference."""
    for rank, (found, calls) in enumerate(run(tp, numbers_case, tp, vocabulary)):
        has_columns = rank * -(-vocabulary // tp) < vocabulary
        assert bool(calls["row_statistics"] and calls["statistics_gradient"]) == has_columns
        for name, deviations in found.items():
            deviations.pop("bytes")
            assert deviations.pop("loss") <= 1e-5 and max(deviations.values()) <= 1e-4, (name, deviations)


def test_blocks_by_bytes() -> None:
    """On a CPU they suit its caches, on a device there are few; temporaries stay below a share of the logits."""
    cpu, device = torch.device("cpu"), torch.device("cuda")
    lines, width = 8192, 16032
    for stored, cost in ((2, 2), (2, 6), (4, 8), (4, 16)):
        for where, most in ((cpu, 0.1), (device, 0.167)):
            found = list(blocks.pieces(lines, width, stored, cost, where))
            assert [first for first, _ in found[1:]] == [last for _, last in found[:-1]] and found[-1][1] == lines
            assert (found[0][1] - 1) * width * cost <= most * stored * lines * width
        assert len(found) <= 6 * cost / stored + 1
    assert list(blocks.pieces(lines, width, 2, 0, device)) == [(0, lines)]
    assert len(list(blocks.pieces(1000, 2000, 4, 8, device))) == 1 < len(list(blocks.pieces(1000, 2000, 4, 8, cpu)))


def test_triton_is_chosen_where_it_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[torch.device] = []
    module = types.ModuleType("tp_plugin.tensor.vocab.triton_kernels")
    module.try_on = tried.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    is_installed = True
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)
    choose = kernels.triton_for.__wrapped__
    assert choose("cuda") is module and choose("xpu") is module and len(tried) == 2
    assert choose("cpu") is None and choose("npu") is None and len(tried) == 2
    is_installed = False
    assert choose("cuda") is None
    is_installed = True

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    module.try_on = fail  # type: ignore[attr-defined]
    assert choose("cuda") is None and "Failed to find C compiler" in caplog.text


def test_what_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 and columns that do not lie side by side go to the reference."""
    stub = Kernels()
    monkeypatch.setattr(kernels, "triton_for", lambda kind: stub)
    for dtype, sums, count in ((torch.float16, torch.float32, 1), (torch.float64, torch.float64, 0)):
        for block in (torch.randn(3, 5).to(dtype), torch.randn(5, 3).to(dtype).t()):
            stub.calls.clear()
            found = torch.zeros(2, 3, dtype=sums)
            kernels.row_statistics(block, None, (0, 5), found)
            assert torch.allclose(found[1].log() + found[0], block.to(sums).logsumexp(-1))
            per_row = found[:1].t()
            kernels.statistics_gradient(block, per_row, None, per_row, columns=(0, 5), dtype=dtype)
            assert stub.calls.total() == (2 * count if block.stride(-1) == 1 else 0)


def test_triton_kernels() -> None:
    """In Triton's interpreter, which needs no GPU. Its stores round 16-bit numbers down, not to the nearest."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (PYTHONPATH may name a folder that it was installed into)")
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(root / "tests" / "triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 162
    for case, deviation in results.items():
        assert deviation <= (2**-7 if case.startswith("gradient") and "float16" in case else 1e-6), case
