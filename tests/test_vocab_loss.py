"""Vocabulary-parallel losses against plain torch: numbers, gradients, bytes sent, bytes held; and who reads what."""

from __future__ import annotations

from collections.abc import Callable

import losses
import pytest
import torch
import torch.nn.functional as F
from losses import LEAD, LOCAL, WHOLE
from memory import LiveBytes
from torch import nn
from workers import run

HIDDEN = 24


class Pair:
    """A plain head, and the same one split over the ranks as the plugin does it."""

    def __init__(self, tp: int, vocabulary: int, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN):
        from tp_plugin.config.run_config import RunConfig
        from tp_plugin.runtime.start import start, stop
        from tp_plugin.tensor.vocab import Vocabulary, VocabularyColumns

        stop()
        runtime = start(RunConfig(tp))
        mesh, peers = runtime.mesh, runtime.remote_logits
        self.group = mesh.tp
        torch.manual_seed(0)
        self.plain = nn.Linear(hidden, vocabulary).to(dtype)
        with torch.no_grad():
            self.plain.weight.normal_(), self.plain.bias.normal_()
        width = -(-vocabulary // tp)
        self.rows = slice(mesh.tp.rank * width, (mesh.tp.rank + 1) * width)
        self.split = nn.Linear(hidden, width).to(dtype)
        self.padding = (0, tp * width - vocabulary)
        self.split.weight.data = F.pad(self.plain.weight.data, (0, 0, *self.padding))[self.rows].clone()
        self.split.bias.data = F.pad(self.plain.bias.data, self.padding)[self.rows].clone()
        self.vocabulary = Vocabulary(vocabulary, width, mesh.tp, peers)
        columns = VocabularyColumns(self.vocabulary)
        self.split.register_forward_pre_hook(columns.before)
        self.split.register_forward_hook(columns.after, prepend=True)

    def input(self, lead: tuple[int, ...] = LEAD) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(*lead, self.plain.in_features, generator=generator)
        return x.to(self.plain.weight.dtype).requires_grad_()

    def apart(self, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Relative deviations of the loss and of the gradients, and the bytes that the split head sent."""
        from counted import ledger

        ledger["bytes"].clear()
        found = self._run(self.split, loss_of)
        sent = sum(ledger["bytes"].values())
        expected = self._run(self.plain, loss_of)
        expected["weight"] = F.pad(expected["weight"], (0, 0, *self.padding))[self.rows]
        expected["bias"] = F.pad(expected["bias"], self.padding)[self.rows]
        deviations = {"bytes": sent}
        for name, want in expected.items():
            assert type(found[name]) is torch.Tensor and found[name].dtype == want.dtype, name
            scale = want.double().norm().clamp_min(1e-12)
            deviations[name] = ((found[name].double() - want.double()).norm() / scale).item()
        return deviations

    def _run(self, head: nn.Linear, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        head.zero_grad()
        x = self.input()
        loss = loss_of(head(x))
        if loss.requires_grad:
            loss.backward()
        grads = {"x": x.grad, "weight": head.weight.grad, "bias": head.bias.grad}
        shapes = {"x": x, "weight": head.weight, "bias": head.bias}
        # an accuracy has no gradients
        return {"loss": loss.detach()} | {k: torch.zeros_like(shapes[k]) if g is None else g for k, g in grads.items()}


def numbers_case(tp: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, float]]:
    pair = Pair(tp, vocabulary, dtype)
    return {loss_of.__name__: pair.apart(loss_of) for loss_of in (*LOCAL, *WHOLE)}


# 97 rows are not divisible; of 5 rows on four ranks the last has none
@pytest.mark.parametrize("tp, vocabulary", [(2, 97), (2, 64), (4, 97), (4, 5)])
def test_numbers(tp: int, vocabulary: int) -> None:
    tokens, columns = 14, -(-vocabulary // tp)
    for found in run(tp, numbers_case, tp, vocabulary):
        for name, deviations in found.items():
            sent = deviations.pop("bytes") - 4 * tokens * HIDDEN * (name != "accuracy")  # the hidden states' gradient
            assert deviations.pop("loss") <= 1e-5, name
            assert max(deviations.values()) <= 1e-4, (name, deviations)
            if name in [loss_of.__name__ for loss_of in LOCAL] and columns > 30:
                assert sent < 4 * tokens * columns / 2, f"{name} sent {sent} bytes"


def bytes_case(tp: int) -> dict[str, dict[str, int]]:
    from counted import ledger

    pair, found = Pair(tp, 97), {}
    for loss_of in (losses.causal, losses.smoothed, losses.accuracy, losses.log_probabilities, losses.sorted_columns):
        for counter in ledger.values():
            counter.clear()
        pair._run(pair.split, loss_of)
        found[loss_of.__name__] = {key: (ledger["count"][key], ledger["bytes"][key]) for key in ledger["count"]}
    return found


def test_bytes() -> None:
    """Exactly: the collectives of each kind of loss, beside the all-reduce of the hidden states' gradient."""
    hidden = (1, 14 * HIDDEN * 4)
    for found in run(2, bytes_case, 2):
        assert found == {
            "causal": {"all_gather/tp": (1, 3 * 14 * 4), "all_reduce/tp": hidden},
            "smoothed": {"all_gather/tp": (1, 4 * 12 * 4), "all_reduce/tp": hidden},
            "accuracy": {"all_gather/tp": (2, 14 * (4 + 8))},
            "log_probabilities": {"all_gather/tp": (1, 2 * 14 * 4), "all_reduce/tp": (3, 2 * 14 * 4 + hidden[1])},
            "sorted_columns": {"all_gather/tp": (1, 14 * 49 * 4), "all_reduce/tp": hidden},
        }


def bf16_case(tp: int) -> dict[str, tuple[float, float]]:
    """Distances from fp64 of the split head in bf16 and of the plain one."""
    exact, pair, found = Pair(tp, 97, torch.bfloat16), Pair(tp, 97, torch.bfloat16), {}  # the last one has the groups
    exact.plain.double()
    for loss_of in (losses.causal, losses.capped, losses.scaled, losses.biased, losses.smoothed, losses.distilled):
        want = exact._run(exact.plain, lambda logits, of=loss_of: of(logits).double())
        plain, split = pair._run(pair.plain, loss_of), pair._run(pair.split, loss_of)
        assert plain["loss"].dtype == split["loss"].dtype
        for name, own in (("loss", slice(None)), ("x", slice(None)), ("weight", pair.rows), ("bias", pair.rows)):
            target = want[name].double()[own] if name in ("weight", "bias") else want[name].double()
            errors = []
            for which in (split, plain):
                value = which[name].double()
                if name in ("weight", "bias"):
                    value = value[: len(target)] if which is split else value[own]
                errors.append(((value - target).norm() / target.norm()).item())
            found[f"{loss_of.__name__} {name}"] = tuple(errors)
    return found


def test_bf16() -> None:
    """As near to exact numbers as plain bf16 is."""
    for found in run(2, bf16_case, 2):
        for name, (split, plain) in found.items():
            assert split <= 1.5 * plain + 2e-3, (name, split, plain)


def autocast_case(tp: int) -> dict[str, float]:
    pair = Pair(tp, 97)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        assert logits.dtype == torch.bfloat16
        return losses.causal(logits)

    with torch.autocast("cpu", torch.bfloat16):
        return pair.apart(loss_of)


def test_autocast() -> None:
    for found in run(2, autocast_case, 2):
        found.pop("bytes")
        assert found.pop("loss") <= 2e-3 and max(found.values()) <= 2e-2, found


def memory_case(vocabulary: int, lead: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Peak of head and loss, forward and backward, and the largest tensor, relative to the local logits in fp32.

    All of it counts but the input: logits (still held at the end), temporaries, the gradients of input and weight.
    """
    pair, found = Pair(2, vocabulary, dtype, hidden=16), {}
    local = 4 * lead[0] * lead[1] * pair.split.out_features
    for loss_of in (
        losses.causal,
        losses.capped,
        losses.scaled,
        losses.biased,
        losses.smoothed,
        losses.trainer_smoothed,
    ):
        pair.split.zero_grad()
        x = pair.input(lead)
        with LiveBytes() as bytes_:
            logits = pair.split(x)
            loss_of(logits).backward()
        found[loss_of.__name__] = bytes_.peak / local, bytes_.largest / local
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype) -> None:
    for found in run(2, memory_case, 16001, (2, 256), dtype):
        for name, (peak, largest) in found.items():
            assert peak <= 1.2, (name, peak)
            assert 0.49 <= largest <= 1, (name, largest)


def test_memory_is_really_counted() -> None:
    with LiveBytes() as bytes_:
        x = torch.ones(1000)
        y = (x * 2).exp()
        del x
        y + 1
    assert (bytes_.peak, bytes_.live, bytes_.largest) == (12000, 4000, 4000)


def reading_case(tp: int) -> None:
    pair = Pair(tp, 97)
    with torch.no_grad():
        logits = pair.split(pair.input())
        losses.read_like_an_ordinary_tensor(logits, whole(logits))
        assert torch.allclose(whole(logits), pair.plain(pair.input()), atol=1e-5)
    for wrong in (97, -1, -99):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            F.cross_entropy(logits.view(-1, 97), torch.full((14,), wrong))


def whole(logits: torch.Tensor) -> torch.Tensor:
    """Another gather than the one under test."""
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, logits.expr.data)  # type: ignore[attr-defined]
    return torch.cat(found, -1)[:, : logits.shape[-1]].reshape(logits.shape).clone()


@pytest.mark.parametrize("tp", [2, 4])
def test_reading(tp: int) -> None:
    run(tp, reading_case, tp)
