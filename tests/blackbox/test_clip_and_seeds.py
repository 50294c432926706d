"""Gradients, norms, clipping, optimizers, freezing, resizing, recomputation, random numbers, bf16."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from .compare import GRADIENT, LOSS, NORM, WEIGHTS, close, peers_agree, same, tensors_close, tensors_in

LAYOUTS = [pytest.param((4, 1), marks=pytest.mark.full), (2, 2)]
MODELS = ["llama", "llama_tied", "gpt2"]
UNTRAINED = 1e-6  # weights that no step has touched yet


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda c: f"tp{c[0]}dp{c[1]}")
def runs(request, bench, checkpoints):
    tp, dp = request.param
    args = ("--models", str(checkpoints["llama"].parent))
    return bench.run(["clip", "seeds"], tp, dp, args), bench.run(["clip", "seeds"], 1, dp, args)


@pytest.fixture
def clip(runs):
    return [run.of("clip") for run in runs]


@pytest.fixture
def seeds(runs):
    return [run.of("seeds") for run in runs]


def states(run, name):
    return tensors_in(run.out / "states" / f"{name}.safetensors")


def gradient_of(run, checkpoint, dtype=torch.float32):
    """The script took one step of bare descent with lr=1e4."""
    after = states(run, f"gradients of {'' if dtype is torch.float32 else 'bf16 '}{checkpoint.name}")
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).state_dict()
    return {name: (before[name].double() - after[name].double()) / 1e4 for name in before}


def relative(got: dict, expected: dict) -> float:
    """Distance of two sets of tensors, relative to the size of the second."""
    squares = [((got[n] - expected[n]).norm() ** 2, expected[n].norm() ** 2) for n in expected]
    return math.sqrt(sum(d for d, _ in squares) / sum(s for _, s in squares))


@pytest.mark.parametrize("model", MODELS)
def test_every_gradient(clip, checkpoints, model):
    run, plain = clip
    got, expected = (gradient_of(r, checkpoints[model]) for r in (run, plain))
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, f"{name}: the oracle has no gradient to compare"
        off = relative({name: got[name]}, {name: gradient})
        assert off <= GRADIENT, f"{model} at {run.layout}, {name}: gradient off by {off:.1e}"


def test_losses_and_norms(clip):
    run, plain = clip
    for name, expected in plain.report.items():
        got = run.report[name]
        same(got, expected, ["parameters", "trainable", "group sizes", "vocab_size", "rows"], name)
        close(got["losses"], expected["losses"], LOSS, f"{name}: losses")
        close(got["norms"], expected["norms"], NORM, f"{name}: norms")
    peers_agree(run, list(plain.report))


def test_weights_after_each_way_of_training(clip):
    run, plain = clip
    for name in plain.report:
        if not name.startswith("gradients"):
            tensors_close(states(run, name), states(plain, name), WEIGHTS, name)


def test_weights_from_config_are_those_of_the_first_rank(seeds):
    """Each rank initialised with another seed; all must train what the first one drew."""
    run, plain = seeds
    for model in ("llama", "gpt2"):
        name = f"{model} from config"
        tensors_close(states(run, f"{name}, at first"), states(plain, f"{name}, at first"), UNTRAINED, name)
        tensors_close(states(run, f"{name}, at last"), states(plain, f"{name}, at last"), WEIGHTS, name)
        for process, group in enumerate(run.layout.groups()):
            for rank in group:
                expected = plain.ranks[process][name]
                close(run.ranks[rank][name]["losses"], expected["losses"], LOSS, f"{name}, rank {rank}: losses")
                close(run.ranks[rank][name]["norms"], expected["norms"], NORM, f"{name}, rank {rank}: norms")


def test_replicas_stay_equal(seeds):
    """Bit for bit and on all ranks of the world, whatever dropout and seeds did."""
    run, plain = seeds
    for name, expected in plain.ranks[0].items():
        if isinstance(expected, dict):
            for own in run.ranks:
                assert own[name]["replicated"].keys() == expected["replicated"].keys()
                assert own[name]["replicated"] == run.ranks[0][name]["replicated"], name


def test_dropout_is_one_draw_per_group(seeds):
    """Hidden states, logits and losses agree in a TP group, and the groups draw for themselves."""
    run, plain = seeds
    names = [name for name, found in plain.ranks[0].items() if "dropout" in name]
    for group in run.layout.groups():
        for peer in group[1:]:
            for name in names:
                for key in ("losses", "norms", "hidden", "logits", "evaluated"):
                    close(run.ranks[peer][name][key], run.ranks[group[0]][name][key], 1e-6, f"{name}: {key}")
    for name in names:
        own = run.ranks[0][name]
        assert not math.isclose(own["evaluated"], own["losses"][-1], rel_tol=1e-3), "dropout was not active"


def test_dropout_is_that_of_the_plain_run(seeds):
    """A seeded run repeats the plain one, recomputed or not, with dropout outside of sharded regions and inside."""
    run, plain = seeds
    names = [name for name in plain.ranks[0] if name.startswith(("replicated dropout", "dropout, recomputed"))]
    assert len(names) == 7
    for name in names:
        for process, group in enumerate(run.layout.groups()):
            for rank in group:
                got, expected = run.ranks[rank][name], plain.ranks[process][name]
                close(got["losses"], expected["losses"], LOSS, f"{name}, rank {rank}: losses")
                close(got["norms"], expected["norms"], NORM, f"{name}, rank {rank}: norms")
                assert got["after"] == expected["after"], f"{name}, rank {rank}: the generator stands elsewhere"


def test_recomputation_repeats_the_dropout(seeds):
    run, _ = seeds
    for own in run.ranks:
        expected = own["dropout, recomputed None"]
        for recomputed in ("False", "True"):
            got = own[f"dropout, recomputed {recomputed}"]
            close(got["losses"], expected["losses"], LOSS, f"recomputed {recomputed}: losses")
            close(got["norms"], expected["norms"], NORM, f"recomputed {recomputed}: norms")


def test_heads_drop_for_themselves(seeds):
    """A rank draws the masks of its own heads: were the draws of the ranks the same, heads would share masks."""
    run, plain = seeds
    assert len(set(plain.ranks[0]["dropped by head"])) == 4
    assert run.ranks[0]["dropped by head"] == plain.ranks[0]["dropped by head"]
    for group in run.layout.groups():
        first, *others = (run.ranks[rank]["dropped by head"] for rank in group)
        assert len(first) == len(set(first)) == 4, f"masks by head in group {group}: {first}"
        assert all(other == first for other in others), "ranks of a group were shown other attention weights"


@pytest.fixture(scope="module")
def bf16(bench, checkpoints):
    """Two ranks in bf16; one process in bf16; one process in fp32, against which both have an error."""
    args = ("--models", str(checkpoints["llama"].parent), "--precision")
    return [bench.run("bf16", tp, 1, (*args, precision)) for tp, precision in ((2, "bf16"), (1, "bf16"), (1, "no"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "whole"])
@pytest.mark.parametrize("model", MODELS)
def test_bf16_gradients(bf16, checkpoints, model, dtype):
    """Two bf16 runs that add in another order err by the same amount, not to the same value.

    The ranks round each partial sum and then the sum of both, where one process rounds once: an error of up to
    sqrt(1 + 2/2) = 1.4 in the activations that are reduced, and nothing more elsewhere.
    """
    run, plain, exact = (gradient_of(r, checkpoints[model], dtype) for r in bf16)
    spread = relative(plain, exact)
    assert spread > 1e-3, "the oracle did not compute in bf16"
    assert 1e-3 < relative(run, exact) <= 1.4 * spread
    for name in exact:
        got, expected = (relative({name: r[name]}, {name: exact[name]}) for r in (run, plain))
        assert got <= max(2 * expected, 1.4 * spread), f"{name}: error {got:.1e}, that of one process {expected:.1e}"


@pytest.mark.parametrize("key", ["losses", "norms"])
def test_bf16_training(bf16, key):
    """Six steps of three models: eighteen errors of either run, enough to compare their sizes, not each with each.

    The ranks' rounding makes errors up to 1.4 times as large (above); the size itself is known to a factor of 1.5.
    """

    def errors(run, exact):
        found = []
        for model in MODELS:
            pairs = zip(
                run.ranks[0][f"training of {model}"][key], exact.ranks[0][f"training of {model}"][key], strict=True
            )
            found += [abs(a / b - 1) for a, b in pairs]
        return found

    run, plain, exact = bf16
    spread = math.sqrt(sum(e**2 for e in errors(plain, exact)) / 18)
    assert spread > 1e-4, "the oracle did not compute in bf16"
    size = math.sqrt(sum(e**2 for e in errors(run, exact)) / 18)
    assert size <= 1.4 * 1.5 * spread, f"{key}: error {size:.1e}, that of one process {spread:.1e}"
    assert max(errors(run, exact)) <= 4 * 1.4 * spread, f"{key}: {errors(run, exact)}, of one process {spread:.1e}"
