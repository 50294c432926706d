"""What a sharded region draws: this rank's part of one process' masks. Whole models: test_dropout_masks.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tp_plugin.tensor import rng, whole_masks
from tp_plugin.tensor.sequence import Tokens
from tp_plugin.tensor.whole_masks import CutFeatures, CutHeads, Cuts

HEADS = ((0, 3),), ((3, 5),), ((5, 6),)
WIDTH = ((0, 4), (8, 12)), ((4, 8), (12, 14))


def region(rank: int, cuts: Cuts) -> rng.ShardedRegion:
    return rng.ShardedRegion("layers.0.mlp", rank, cuts)


def drawn(one: rng.ShardedRegion | None, function: Any, *args: torch.Tensor) -> tuple[Any, ...]:
    """What ``function`` gives from seed 3 inside a region, the gradients of ``args``, and what is drawn afterwards."""
    torch.manual_seed(3)
    args = tuple(arg.detach().requires_grad_() for arg in args)
    if one is not None:
        one.begin(torch.device("cpu"))
    output = function(*args)
    if one is not None:
        one.end()
    output.sum().backward()
    return output.detach(), [arg.grad for arg in args], torch.rand(3)


def part(whole: torch.Tensor, parts: Any, rank: int, dim: int) -> torch.Tensor:
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in parts[rank]], dim)


def native(x: torch.Tensor) -> torch.Tensor:
    """What dropout is on a device."""
    return torch.native_dropout(x, 0.4, True)[0]


FUNCTIONS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "in place": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "a module": torch.nn.Dropout(0.4),
    "on a device": native,
    "twice": lambda x: F.dropout(F.dropout(x, 0.4), 0.1) + F.dropout(x, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_part_of_the_whole_mask(name: str, dtype: torch.dtype) -> None:
    scores, features = torch.randn(2, 6, 5, 5).to(dtype), torch.randn(2, 5, 14).to(dtype)
    swapped = torch.randn(2, 5, 6, 5).to(dtype).transpose(1, 2)
    heads = [CutHeads(HEADS, rank) for rank in range(3)]
    width = [CutFeatures((WIDTH,), rank) for rank in range(2)]
    for whole, cuts, parts, dim in ((scores, heads, HEADS, 1), (features, width, WIDTH, 2), (swapped, heads, HEADS, 1)):
        if whole is swapped and name == "twice":
            break  # what torch computes of one head does not tell any more how heads lie
        expected = drawn(None, FUNCTIONS[name], whole)
        for rank, cut in enumerate(cuts):
            mine = part(whole, parts, rank, dim)
            if whole is swapped:
                mine = part(whole.transpose(1, 2), parts, rank, 2).transpose(1, 2)  # as one of many heads lies
            found = drawn(region(rank, cut), FUNCTIONS[name], mine)
            for got, wanted in ((found[0], expected[0]), (found[1][0], expected[1][0])):
                wanted = part(wanted, parts, rank, dim)
                assert torch.equal(got == 0, wanted == 0)
                # the CPU rounds the factor of native_dropout otherwise forward than backward; devices do not
                close = name == "on a device" and dtype is torch.bfloat16
                torch.testing.assert_close(got, wanted, **({} if close else {"rtol": 0, "atol": 0}))
            assert torch.equal(found[2], expected[2]), "the generator is not where one process' is"


def test_heads_folded_into_the_batch() -> None:
    whole = torch.randn(2, 6, 5, 5)
    expected = drawn(None, FUNCTIONS["dropout"], whole.flatten(0, 1))
    for rank in range(3):
        mine = part(whole, HEADS, rank, 1).flatten(0, 1)
        found = drawn(region(rank, CutHeads(HEADS, rank, folded=True)), FUNCTIONS["dropout"], mine)
        assert torch.equal(found[0], part(expected[0].unflatten(0, (2, 6)), HEADS, rank, 1).flatten(0, 1))
        assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_attention_without_a_fused_kernel(mode: Any) -> None:
    """Grouped queries too: of a key's heads this rank has some."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with mode():
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True, enable_gqa=True)
        return out if mode is torch.enable_grad else (q.sum() + k.sum() + v.sum()) * 0 + out.clone()

    query, (key, value) = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 2, 5, 8)
    parts = ((0, 2),), ((2, 3),), ((3, 6),)
    keys = ((0, 1),), ((0, 1),), ((1, 2),)
    expected = drawn(None, attend, query, key, value)
    for rank in range(3):
        mine = part(query, parts, rank, 1), part(key, keys, rank, 1), part(value, keys, rank, 1)
        output, grads, after = drawn(region(rank, CutHeads(parts, rank)), attend, *mine)
        torch.testing.assert_close(output, part(expected[0], parts, rank, 1))
        torch.testing.assert_close(grads[0], part(expected[1][0], parts, rank, 1))
        assert torch.equal(after, expected[2])


def test_tokens_with_padding() -> None:
    """Five tokens on two ranks: the second has two, and zeros that nobody sees."""
    whole = torch.randn(2, 5, 4)
    expected = drawn(None, FUNCTIONS["dropout"], whole)
    for rank in range(2):
        stack: Any = SimpleNamespace(length=5, group=SimpleNamespace(size=2, rank=rank))
        mine = F.pad(whole, (0, 0, 0, 1))[:, 3 * rank : 3 * rank + 3]
        found = drawn(region(rank, Tokens(stack)), FUNCTIONS["dropout"], mine)
        seen = slice(3 * rank, min(5, 3 * rank + 3))
        assert torch.equal(found[0][:, : 3 - rank], expected[0][:, seen])
        assert torch.equal(found[2], expected[2])
        folded = drawn(region(rank, Tokens(stack)), FUNCTIONS["dropout"], mine.flatten(0, 1))
        assert torch.equal(folded[0].view(2, 3, 4)[:, : 3 - rank], expected[0][:, seen])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    whole_masks.draws_own.cache_clear()
    yield caplog
    whole_masks.draws_own.cache_clear()


def test_what_nobody_knows_has_a_stream_of_its_own(said: pytest.LogCaptureFixture) -> None:
    x = torch.ones(2, 7, 9)
    for function in (FUNCTIONS["dropout"], lambda x: x * torch.rand_like(x), lambda x: x * torch.rand(9)):
        ranks = [drawn(region(rank, CutFeatures((WIDTH,), rank)), function, x) for rank in range(2)]
        again = drawn(region(0, CutFeatures((WIDTH,), 0)), function, x)
        assert not torch.equal(ranks[0][0], ranks[1][0]) and torch.equal(ranks[0][0], again[0])
        assert torch.equal(ranks[0][2], ranks[1][2])
    told = [record.getMessage() for record in said.records]
    assert told[0].startswith("layers.*.mlp, where bernoulli_ of the shape (2, 7, 9) is split as no policy says, draws")
    assert len(told) == 3, "each is said once"


def test_a_fused_kernel_has_masks_of_its_own(said: pytest.LogCaptureFixture) -> None:
    """Without dropout it draws nothing, and nothing is said."""
    q = torch.randn(2, 3, 5, 8)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = drawn(region(0, CutHeads(HEADS, 0)), lambda q: F.scaled_dot_product_attention(q, q, q), q)
    assert torch.equal(found[0], attend(q, q, q)[0]) and not said.records
    assert not whole_masks.draws_whole(torch.device("privateuseone")) and whole_masks.draws_whole(torch.device("cuda"))
    assert said.records.pop().getMessage().startswith("the device type privateuseone draws dropout masks of its own")
    module = torch.nn.Linear(1, 1)
    module.config = SimpleNamespace(_attn_implementation="flash_attention_2")  # type: ignore[assignment]
    assert [whole_masks.attends_elsewhere(module) for _ in range(2)] == [True, True]
    assert [record.getMessage()[:46] for record in said.records] == ["the attention kernel flash_attention_2 draws d"]
    module.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    assert not whole_masks.attends_elsewhere(module)


def test_inside_a_region_within_another() -> None:
    """The inner one's split counts; what is replicated is drawn as it is, in whichever."""
    tokens: Any = SimpleNamespace(length=4, group=SimpleNamespace(size=2, rank=0))
    outer, inner = region(0, Tokens(tokens)), region(0, CutFeatures((WIDTH,), 0))
    x = torch.ones(2, 2, 8)
    torch.manual_seed(3)
    expected = [F.dropout(torch.ones(2, 2, 14), 0.5), F.dropout(x, 0.5), F.dropout(torch.ones(2, 4, 8), 0.5)]
    torch.manual_seed(3)
    outer.begin(x.device)
    inner.begin(x.device)
    found = [F.dropout(x, 0.5)]
    inner.pause()
    found.append(F.dropout(x, 0.5))
    inner.resume()
    inner.end()
    found.append(F.dropout(x, 0.5))
    outer.end()
    assert torch.equal(found[0], part(expected[0], WIDTH, 0, -1))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2][:, :2])
    assert torch.overrides._get_current_function_mode() is None
