"""The classic loop: everything that it logs and saves is what as many plain processes log and save."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from .compare import LOSS, NORM, checkpoints_equal, close, peers_agree, same

# Every layout, model and door to tp_size at least once; the product of all three would cost an hour.
# One case of each door is launched as a user launches it; processes of the others are forked with their imports done.
CASES = [
    pytest.param(("llama", 2, 1, "yaml", "forked"), marks=pytest.mark.full),
    ("llama", 2, 2, "yaml", "real"),
    pytest.param(("llama", 4, 1, "yaml", "forked"), marks=pytest.mark.full),
    # tests/test_launch.py has this door
    pytest.param(("llama_tied", 2, 1, "yaml multi_gpu", "real"), marks=pytest.mark.full),
    ("gpt2", 2, 1, "torchrun", "real"),
    pytest.param(("gpt2", 2, 2, "command line", "real"), marks=pytest.mark.full),
    ("gpt2", 4, 1, "yaml", "forked"),
    ("llama", 2, 2, "stages2", "real"),
    ("gpt2", 4, 1, "stages2", "forked"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-tp{c[1]}dp{c[2]}-{c[3]}".replace(" ", "_"))
def runs(request, bench, checkpoints):
    """The run to be judged, and its oracle."""
    model, tp, dp, entry, processes = request.param
    args = ("--models", str(checkpoints["llama"].parent), "--model", model)
    return bench.run("loop", tp, dp, args, entry=entry, real=processes == "real"), bench.run("loop", 1, dp, args)


def test_counts_are_those_of_dp_processes(runs):
    run, plain = runs
    assert run.report["num_processes"] == run.layout.dp
    keys = ["num_processes", "total_batch", "batches_before_prepare", "batches", "eval_batches", "batches_seen"]
    same(run.report, plain.report, [*keys, "updates", "training_tokens"], str(run.layout))
    assert [own["process_index"] for own in run.ranks] == [
        d for d, group in enumerate(run.layout.groups()) for _ in group
    ]
    assert [own["is_main"] for own in run.ranks] == [True] + [False] * (len(run.ranks) - 1)


def test_model_looks_whole_before_prepare(runs):
    run, plain = runs
    keys = ["parameters", "num_parameters", "trainable", "shapes", "embedding_rows", "group_sizes"]
    same(run.report, plain.report, keys, str(run.layout))


def test_each_rank_holds_its_share(runs):
    """Without this, a run on whole replicas would pass for tensor-parallel."""
    run, plain = runs
    for own in run.ranks:  # the vocabulary's padding, replicated norms, biases and key-value heads take a little more
        assert own["bytes"] < plain.ranks[0]["bytes"] * (1 / run.layout.tp + 0.1)


def test_steps(runs):
    run, plain = runs
    steps, expected = run.report["steps"], plain.report["steps"]
    assert len(steps) == len(expected)
    for i, (got, want) in enumerate(zip(steps, expected, strict=True)):
        same(got, want, ["ids", "batch_size", "tokens", "last_of_epoch", "synced", "lr"], f"step {i}")
        close(got["losses"], want["losses"], LOSS, f"losses of step {i}")
        close(got["mean_loss"], want["mean_loss"], LOSS, f"mean loss of step {i}")
        close(got["norm"], want["norm"], NORM, f"gradient norm of step {i}")
    norms = [step["norm"] for step in expected if step["norm"] is not None]
    assert max(norms) > 0.5, "clipping was never active: this test would not notice a wrong norm in the weights"


def test_evaluation(runs):
    run, plain = runs
    for got, want in zip(run.report["evaluations"], plain.report["evaluations"], strict=True):
        same(got, want, ["ids", "tokens", "count", "logits_width", "batches"], "evaluation")
        assert got["count"] == 7
        close(got["losses"], want["losses"], LOSS, "losses")
        close(got["mean"], want["mean"], LOSS, "mean")


def test_ranks_of_a_group_agree(runs):
    peers_agree(runs[0], ["process_index", "ids", "losses", "norms"])


def test_saved_checkpoint_is_the_plain_one(runs, checkpoints):
    run, plain = runs
    same(run.report, plain.report, ["state_dict"], "get_state_dict")
    for folder in ("pretrained", "pretrained_by_all", "save_model"):
        checkpoints_equal(run.out / folder, plain.out / folder)


def test_oracle_moved_the_weights(runs, checkpoints, request):
    """A comparison of weights says something only if training moved them by far more than the tolerance."""
    _, plain = runs
    before = AutoModelForCausalLM.from_pretrained(checkpoints[request.node.callspec.params["runs"][0]])
    after = AutoModelForCausalLM.from_pretrained(plain.out / "pretrained").state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.dist(after[name], tensor, p=float("inf")) > 1e-3, name
