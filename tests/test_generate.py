"""``generate()``: the same tokens on every rank of a TP group, and those of one process, in every mode there is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import build, config_for
from test_parallel import pair, rank
from transformers import TextStreamer
from workers import run

PROMPT = torch.tensor([[0, 0, 5, 17, 33, 21], [9, 4, 61, 8, 3, 70]])
MASK = (torch.arange(6) >= torch.tensor([[2], [0]])).long()


@contextlib.contextmanager
def generation() -> Iterator[None]:
    """Inside, ``generate`` is what it is in a run with a ``tp_size``."""
    from transformers import generation

    from tp_plugin.engines import patching
    from tp_plugin.engines.transformers import install_generation

    before = len(patching._originals)
    install_generation(generation.utils)
    mine = patching._originals[before:]
    try:
        yield
    finally:
        for owner, name, original in reversed(mine):  # not those of a library that was imported meanwhile
            patching.put_back(owner, name, original)
            patching._originals.remove((owner, name, original))


class Heard(TextStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def own_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A script's own decoding loop (``custom_generate``)."""
    for _ in range(4):
        logits = model(input_ids=input_ids).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids


def tokens(model: Any, seed: int = 3, prompt: torch.Tensor = PROMPT, **how: Any) -> list[Any]:
    """Tokens, and scores where they are asked for; unequal seeds, rank 0 with the oracle's."""
    torch.manual_seed(seed + 7 * rank() * hasattr(model, "tp_record"))
    mask = MASK if prompt is PROMPT else torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **how)
    if isinstance(out, torch.Tensor):
        return out.tolist()
    found = [out.sequences.tolist(), [score.amax(-1).tolist() for score in out.scores or ()]]
    return [*found, out.sequences_scores.tolist()] if "sequences_scores" in out else found


def equal(got: Any, expected: Any, where: str) -> None:
    if isinstance(expected, list):
        assert len(got) == len(expected), where
        for one, other in zip(got, expected, strict=True):
            equal(one, other, where)
    else:
        assert got == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected), where


def streamed(model: Any) -> list[Any]:
    heard = Heard()
    return [tokens(model, prompt=PROMPT[1:], streamer=heard), heard.tokens]


MODES: dict[str, Callable[[Any], list[Any]]] = {
    "greedy": tokens,
    "without a cache": lambda model: tokens(model, use_cache=False),
    "scores": lambda model: tokens(model, output_scores=True, return_dict_in_generate=True),
    "sampling": lambda model: tokens(model, do_sample=True, top_k=20, top_p=0.9, temperature=1.3),
    "several samples": lambda model: tokens(model, do_sample=True, num_return_sequences=3),
    "beams": lambda model: tokens(
        model, num_beams=4, num_return_sequences=2, length_penalty=0.7, output_scores=True, return_dict_in_generate=True
    ),
    "sampled beams": lambda model: tokens(model, num_beams=3, do_sample=True, repetition_penalty=1.3),
    "static cache": lambda model: tokens(model, cache_implementation="static"),
    "static cache, beams": lambda model: tokens(model, cache_implementation="static", num_beams=2),
    "prefill in pieces": lambda model: tokens(model, prefill_chunk_size=2),
    "looked up in the prompt": lambda model: tokens(model, prompt=PROMPT[1:], prompt_lookup_num_tokens=3),
    "early exit": lambda model: tokens(model, prompt=PROMPT[1:], assistant_early_exit=1),
    "streamer": streamed,
    "synced": lambda model: tokens(model, synced_gpus=True),
    "own loop": lambda model: tokens(model, custom_generate=own_loop),
    "minimum, n-grams, bad words": lambda model: tokens(
        model, min_new_tokens=6, no_repeat_ngram_size=2, bad_words_ids=[[7], [11, 12]], suppress_tokens=[5]
    ),
}


def modes_case(tp: int, model_type: str, modes: list[str], overrides: dict[str, Any]) -> dict[str, list[Any]]:
    """Per mode: what one process gives, and what this rank gives."""
    whole, sharded = pair(tp, model_type, **overrides)
    whole.eval(), sharded.eval()
    with generation():
        return {mode: [MODES[mode](whole), MODES[mode](sharded)] for mode in modes}


ONE_KEY = {"num_key_value_heads": 1}
CASES = [(2, "llama", ONE_KEY), *(pytest.param(*case, marks=pytest.mark.full) for case in [(4, "gpt2", {})])]


@pytest.mark.parametrize("tp, model_type, overrides", CASES)
def test_all_modes(tp: int, model_type: str, overrides: dict[str, Any]) -> None:
    modes = [mode for mode in MODES if model_type != "gpt2" or mode != "early exit"]  # GPT-2 cannot skip layers
    results = run(tp, modes_case, tp, model_type, modes, overrides)
    for mode in modes:
        expected = results[0][mode][0]
        for at, result in enumerate(results):
            equal(result[mode][1], expected, f"{mode}, rank {at}")


def assisted_case(assistant: str) -> list[list[Any]]:
    from tp_plugin.shard import parallelize

    whole, sharded = pair(2)
    small = build(config_for("llama", num_hidden_layers=1, hidden_size=24), seed=1).eval()
    helper = copy.deepcopy(small)
    if assistant == "sharded":
        parallelize(helper, 2)
    whole.eval(), sharded.eval()
    with generation():
        found = []
        for how in ({}, {"do_sample": True}):
            found += [tokens(whole, prompt=PROMPT[1:], assistant_model=small, **how)]
            found += [tokens(sharded, prompt=PROMPT[1:], assistant_model=helper, **how)]
        return found


@pytest.mark.parametrize("assistant", ["sharded", "whole"])
def test_assisted(assistant: str) -> None:
    for greedy, sharded_greedy, sampled, sharded_sampled in run(2, assisted_case, assistant):
        assert sharded_greedy == greedy
        assert sharded_sampled == sampled


def alone_case() -> list[list[Any]]:
    """The leader generates alone, with what cannot simply be sent to its peer, which waits at a barrier."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER
    from tp_plugin.shard import parallelize

    whole, sharded = pair(2)
    small = build(config_for("llama", num_hidden_layers=1, hidden_size=24), seed=1).eval()
    helper = parallelize(copy.deepcopy(small), 2)
    whole.eval(), sharded.eval()
    sync_points = require().sync_points
    sync_points.rendezvous(BARRIER)
    found = []
    with generation():
        if rank() == 0:
            one = PROMPT[1:]
            for model, assistants in ((whole, [small, small]), (sharded, [helper, small])):
                found.append([tokens(model, prompt=one, do_sample=True, assistant_model=a) for a in assistants])
                found[-1] += [streamed(model), tokens(model, cache_implementation="static", num_beams=2)]
        sync_points.rendezvous(BARRIER)
    return found


def test_the_main_process_alone_brings_its_streamer_and_its_assistant() -> None:
    (whole, sharded), _ = run(2, alone_case)
    assert sharded == whole


def encoder_decoder_alone_case(model_type: str) -> list[Any]:
    """The leader alone: a forward, beams; then all of them train."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.runtime.sync_points import BARRIER
    from tp_plugin.shard import parallelize

    stop()
    whole = build(config_for(model_type), auto="AutoModelForSeq2SeqLM").eval()
    sharded = parallelize(copy.deepcopy(whole), 2)
    sync_points = require().sync_points
    sync_points.rendezvous(BARRIER)
    found: list[Any] = []
    with generation():
        if rank() == 0:
            for model in (whole, sharded):
                with torch.no_grad():
                    loss = model(input_ids=PROMPT, attention_mask=MASK, labels=PROMPT.flip(1)).loss.item()
                found.append([loss, tokens(model), tokens(model, num_beams=3)])
        sync_points.rendezvous(BARRIER)
    for model in (whole, sharded):
        model.train()
        found.append(model(input_ids=PROMPT, attention_mask=MASK, labels=PROMPT.flip(1)).loss.item())
    return found


@pytest.mark.parametrize("model_type", ["t5", pytest.param("bart", marks=pytest.mark.full)])
def test_the_main_process_alone_with_an_encoder_and_a_decoder(model_type: str) -> None:
    leader, peer = run(2, encoder_decoder_alone_case, model_type)
    equal(leader[1], leader[0], "alone")
    equal([leader[3], peer[1]], [leader[2], peer[0]], "then all")
