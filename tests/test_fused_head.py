"""``tp_plugin: {fused_head: true}``: head and loss by blocks, no logits in memory, and the numbers of a run without."""

from __future__ import annotations

import time
import warnings
from typing import Any

import losses
import pytest
import torch
from memory import LiveBytes
from models import batch, build, config_for
from test_vocab_loss import Pair
from workers import run, sees_whole
from zoo import fresh

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError


def fused_pair(tp: int, vocabulary: int, dtype: torch.dtype = torch.float32, hidden: int = 24) -> Pair:
    from tp_plugin.tensor.vocab import FusedForward

    pair = Pair(tp, vocabulary, dtype, hidden)
    FusedForward.install(pair.split, pair.vocabulary)
    return pair


def numbers_case(tp: int, vocabulary: int) -> dict[str, list[dict[str, float]]]:
    pairs = fused_pair(tp, vocabulary), None
    found = {of.__name__: [pairs[0].apart(of)] for of in (*losses.LOCAL, *losses.WHOLE)}
    kept = Pair(tp, vocabulary)
    for of in (*losses.LOCAL, *losses.WHOLE):
        found[of.__name__].append(kept.apart(of))
    return found


@pytest.mark.parametrize("tp, vocabulary", [(2, 97), (4, 5)])
def test_numbers(tp: int, vocabulary: int) -> None:
    """Of all that scripts do with logits; it sends what a head that keeps them sends."""
    for found in run(tp, numbers_case, tp, vocabulary):
        for name, (deviations, kept) in found.items():
            assert deviations.pop("bytes") == kept["bytes"], name
            assert deviations.pop("loss") <= 1e-5 and max(deviations.values()) <= 1e-4, (name, deviations)


def bf16_case() -> dict[str, tuple[float, float]]:
    """Distances from fp64 of the fused head in bf16 and of the plain one."""
    exact, pair, found = Pair(2, 97, torch.bfloat16), fused_pair(2, 97, torch.bfloat16), {}
    exact.plain.double()
    for loss_of in (losses.causal, losses.capped, losses.scaled, losses.biased, losses.smoothed):
        want = exact._run(exact.plain, lambda logits, of=loss_of: of(logits).double())
        plain, split = pair._run(pair.plain, loss_of), pair._run(pair.split, loss_of)
        for name in ("loss", "x", "weight", "bias"):
            own = pair.rows if name in ("weight", "bias") else slice(None)
            target = want[name].double()[own] if name != "loss" else want[name].double()
            errors = []
            for which in (split, plain):
                value = which[name].double()
                if name in ("weight", "bias"):
                    value = value[: len(target)] if which is split else value[own]
                errors.append(((value - target).norm() / target.norm()).item())
            found[f"{loss_of.__name__} {name}"] = tuple(errors)
    return found


def test_bf16() -> None:
    for found in run(2, bf16_case):
        for name, (split, plain) in found.items():
            assert split <= 1.5 * plain + 2e-3, (name, split, plain)


def memory_case(dtype: torch.dtype, autocast: bool) -> dict[str, tuple[float, float]]:
    """Peak of head and loss in both directions, and the largest tensor, relative to the local logits."""
    pair, found = fused_pair(2, 16001, dtype, hidden=16), {}
    size = 2 if autocast else dtype.itemsize
    local = size * 2 * 256 * pair.split.out_features
    for loss_of in (losses.causal, losses.capped, losses.biased, losses.smoothed, losses.trainer_smoothed):
        pair.split.zero_grad()
        x = pair.input((2, 256))
        with LiveBytes() as bytes_, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_of(pair.split(x)).backward()
        found[loss_of.__name__] = bytes_.peak / local, bytes_.largest / local
    return found


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_no_logits(dtype: torch.dtype, autocast: bool) -> None:
    """No tensor of a fraction of their size is ever made, but the weight's gradient (and autocast's copy of it)."""
    for found in run(2, memory_case, dtype, autocast):
        for name, (peak, largest) in found.items():
            assert largest <= 0.11 and peak <= 0.35, (name, peak, largest)


def _models(name: str, fused: bool = True, **changes: Any) -> tuple[Any, Any, Any]:
    import tp_plugin

    fresh(fused_head=fused)
    config = config_for(name, **changes)
    sharded, plain = build(config), build(config)
    tp_plugin.parallelize(sharded, tp_size=2)
    return config, sharded, plain


def model_case(name: str, changes: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    from counted import ledger

    counts, found = [], {}
    for fused in (True, False):
        config, sharded, plain = _models(name, fused, **changes)
        data = batch(config.get_text_config().vocab_size, 0)
        for book in ledger.values():
            book.clear()
        loss = sharded.train()(**data, **settings).loss
        loss.backward()
        counts.append({key: dict(book) for key, book in ledger.items()})
        if fused:
            want = plain.train()(**data, **settings).loss
            want.backward()
            found["loss"] = abs(loss.item() / want.item() - 1)
            layouts, rank = sharded.tp_record.plan.layouts, torch.distributed.get_rank()
            for key, parameter in plain.named_parameters():
                own = layouts[key].shard(parameter.grad, rank).double()
                apart = (sharded.get_parameter(key).grad.double() - own).norm() / own.norm().clamp_min(1e-9)
                found[key] = apart.item()
    return {"apart": found, "same collectives": counts[0] == counts[1]}


MODELS = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "soft-capped": ("gemma2", {"final_logit_softcapping": 3.0}, {}),
    "scaled": ("cohere", {"logit_scale": 0.3}, {}),
    "divided": ("granite", {"logits_scaling": 4.0}, {}),
    "biased": ("gptj", {}, {}),
    "items": ("llama", {}, {"num_items_in_batch": torch.tensor(11)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    for found in run(2, model_case, *MODELS[name]):
        assert found["same collectives"]
        assert found["apart"].pop("loss") <= 1e-5 and max(found["apart"].values()) <= 1e-4, found


def reading_case(reader: int) -> list[bool]:
    """All ranks, and then one alone, read logits before and after the backward."""
    config, sharded, plain = _models("llama")
    rank, seen = torch.distributed.get_rank(), []
    for when in ("before", "after", "never"):
        outputs, expected = (model.train()(**batch(config.vocab_size, 0)) for model in (sharded, plain))
        if when == "after":
            outputs.loss.backward()
        if when != "never":
            seen.append(torch.equal(outputs.logits.argmax(-1), expected.logits.argmax(-1)))
            if rank == reader:
                seen.append(torch.allclose(outputs.logits, expected.logits, atol=1e-5))
            else:
                time.sleep(0.1)
        if when != "after":
            outputs.loss.backward()
    torch.distributed.barrier()
    with torch.no_grad():
        outputs, expected = (model.eval()(**batch(config.vocab_size, 0)) for model in (sharded, plain))
        seen.append(torch.allclose(outputs.logits, expected.logits, atol=1e-5))
    return seen


@pytest.mark.parametrize("reader", [0, 1])
def test_logits_are_computed_when_they_are_read(reader: int) -> None:
    for rank, seen in enumerate(run(2, reading_case, reader)):
        assert seen == [True] * (5 if rank == reader else 3)


@sees_whole
def stepped_case(fused: bool) -> list[str]:
    config, sharded, _ = _models("llama", fused)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3, fused=True)
    said = []
    for retained in (False, True):
        outputs = sharded.train()(**batch(config.vocab_size, 0))
        outputs.loss.backward(retain_graph=retained)
        optimizer.step()
        try:
            outputs.loss.backward() if retained else outputs.logits.argmax(-1)
            said.append("")
        except (TPError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_logits_after_the_weights_have_changed() -> None:
    """Are not those of the forward, so they are refused; without the option they are kept."""
    for read, backward in run(2, stepped_case, True):
        assert "fused_head" in read and "before the optimizer's step" in read
        assert "fused_head" in backward or "modified by an inplace operation" in backward
    for read, _ in run(2, stepped_case, False):
        assert read == ""


def kept_case(why: str) -> tuple[list[str], bool]:
    config, sharded, plain = _models("llama")
    head = sharded.lm_head
    if why == "gathered":
        head.weight.tp_gathered = True
    else:
        head.forward.own = lambda x: torch.nn.functional.linear(x, head.weight) * 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = sharded(**batch(config.vocab_size, 0))
        outputs.loss.backward()
    said = [str(each.message) for each in caught if "fused_head" in str(each.message)]
    return said, bool(torch.allclose(outputs.loss, plain(**batch(config.vocab_size, 0)).loss, rtol=1e-5))


@pytest.mark.parametrize("why, said", [("gathered", "ZeRO-3, FSDP2"), ("patched", "not a plain nn.Linear")])
def test_a_head_that_it_does_not_apply_to(why: str, said: str) -> None:
    for messages, same in run(2, kept_case, why):
        assert same and len(messages) == 1 and said in messages[0]


def test_the_option() -> None:
    assert RunConfig.parse(2, {"fused_head": True}) == RunConfig(2, fused_head=True)
    with pytest.raises(TPError, match=r"tp_plugin\.fused_head: expected true or false, found 'yes'"):
        RunConfig.parse(2, {"fused_head": "yes"})
