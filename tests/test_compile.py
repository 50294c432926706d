"""torch.compile on a sharded model: one graph up to the head, the numbers of one process, eager mode's collectives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import build, config_for
from workers import run
from zoo import fresh

DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
OUTSIDE = {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
"""Dropouts outside the sharded regions: they draw what one process draws."""

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "dropout outside": ("gpt2", OUTSIDE, {}),
    "side by side": ("gptj", {}, {}),
    "experts": ("mixtral", {}, {}),
    "sequence parallel": ("llama", {}, {"sequence_parallel": True}),
}


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 97, (2, 11), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def compiled(model: torch.nn.Module, regional: bool, backend: str) -> Any:
    if regional:
        from accelerate.utils import compile_regions

        return compile_regions(model, backend=backend)
    return torch.compile(model, backend=backend)


def case(
    model_type: str, overrides: dict[str, Any], options: dict[str, Any], backend: str, regional: bool, change: str
) -> dict[str, Any]:
    """Run on every rank: two steps of the whole model in eager mode, of the sharded one in eager mode and compiled."""
    from counted import ledger

    import tp_plugin

    fresh(**options)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    whole = build(config_for(model_type, use_cache=False, **overrides)).train()
    if change == "checkpoints":
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    layouts = sharded.tp_record.plan.layouts
    target = compiled(sharded, regional, backend)
    found: dict[str, Any] = {"loss": [], "grads": {}, "collectives": [], "graphs": []}
    for step in range(2):
        losses, counts = [], []
        for model in (whole, sharded, target):
            for book in ledger.values():
                book.clear()
            torch.manual_seed(step)
            loss = model(**batch(step)).loss
            loss.backward()
            losses.append(loss.item())
            counts.append({key: count for key, count in ledger["count"].items() if key.endswith("/tp")})
            if model is sharded:
                sharded.zero_grad()
        found["loss"].append(abs(losses[2] / losses[0] - 1))
        found["collectives"].append(counts[1:])
        found["graphs"].append(counters["stats"]["unique_graphs"])
        local = dict(sharded.named_parameters())
        for name, parameter in whole.named_parameters():
            want = layouts[name].shard(parameter.grad, sharded.tp_record.mesh.tp.rank)
            apart = (local[name].grad - want).norm() / parameter.grad.norm()
            found["grads"][name] = max(found["grads"].get(name, 0.0), apart.item())
        whole.zero_grad()
        sharded.zero_grad()
    found["breaks"] = list(counters["graph_break"])
    sharded.eval()
    with torch.no_grad():
        found["eval"] = (target(**batch(5)).logits - whole.eval()(**batch(5)).logits).abs().max().item()
    if model_type != "mixtral" and not regional:
        ids = batch(6)["input_ids"]
        tokens = [model.generate(ids, max_new_tokens=3, do_sample=False) for model in (whole, target)]
        found["generated"] = torch.equal(*tokens)
    found["names"] = [name for name in sharded.state_dict() if "_orig_mod" in name]
    return found


def assert_exact(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert max(found["loss"]) <= 1e-5, found
        assert max(found["grads"].values()) <= 1e-4, found
        assert found["eval"] <= 1e-4 and found.get("generated", True) and found["names"] == [], found
        assert all("VocabularyColumns.before" in reason for reason in found["breaks"]), found["breaks"]
        assert found["graphs"][0] == found["graphs"][1], "the second step was compiled anew"


REST = ("side by side", "experts")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if name in REST else ()) for name in CASES])
def test_one_graph_up_to_the_head(name: str) -> None:
    model_type, overrides, options = CASES[name]
    results = run(2, case, model_type, overrides, options, "aot_eager", False, "")
    assert_exact(results)
    for found in results:
        assert found["graphs"][0] == 1, found
        for eager, graph in found["collectives"]:
            if "sequence_parallel" in options:  # eager mode gathers a block's input again; the compiler keeps it
                eager["all_gather/tp"] -= 2 * 2
            assert graph == eager


@pytest.mark.parametrize("change", ["", pytest.param("checkpoints", marks=pytest.mark.full)])
def test_regions(change: str) -> None:
    """Accelerate's use_regional_compilation: each layer a graph."""
    results = run(2, case, "llama", {}, {}, "aot_eager", True, change)
    assert_exact(results)
    for found in results:
        assert found["graphs"][0] <= 5, "embedding, angles, layer, norm, head"


def layers_case(layers: int) -> list[int]:
    """Sizes of the graphs of a model whose layers are compiled one by one."""
    from accelerate.utils import compile_regions

    import tp_plugin
    from tp_plugin.runtime.start import stop

    stop()
    torch._dynamo.reset()
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    config = config_for("llama", num_hidden_layers=layers, use_cache=False)
    model = compile_regions(tp_plugin.parallelize(build(config).train(), tp_size=2), backend=backend)
    model(**batch(0)).loss.backward()
    return sizes


def test_no_layer_is_left_to_eager_mode() -> None:
    """dynamo's limit of graphs for one function, 8, is below the number of layers."""
    for sizes in run(2, layers_case, 10):
        assert sum(size == max(sizes) for size in sizes) == 10


def test_checkpoints() -> None:
    results = run(2, case, "llama", {}, {}, "aot_eager", False, "checkpoints")
    assert_exact(results)
    for found in results:
        for eager, graph in found["collectives"]:
            # what the last layer gives is summed again, rather than kept, for the norm behind it
            assert graph["all_reduce/tp"] == eager["all_reduce/tp"] + 1


@pytest.mark.full  # the same graphs, and a C++ compiler: half a minute
def test_inductor() -> None:
    assert_exact(run(2, case, "llama", {"num_hidden_layers": 1}, {}, "inductor", False, ""))


def dropout_case(sequence_parallel: bool) -> dict[str, Any]:
    """Run on every rank: GPT-2 with dropout inside the blocks, compiled."""
    import tp_plugin

    fresh(sequence_parallel=sequence_parallel)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = tp_plugin.parallelize(build(config_for("gpt2", n_layer=1, **DROPOUT)).train(), tp_size=2)
    target = torch.compile(model, backend="aot_eager")

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return target(**batch(0), use_cache=False).loss

    losses = [loss(seed) for seed in (1, 1, 2)]
    generators = torch.get_rng_state().sum().item()
    weight = model.transformer.h[0].attn.c_attn.weight
    (grad,) = torch.autograd.grad(losses[0], weight)
    ends = []
    for way in (1, -2):  # one step up the gradient, and one down
        with torch.no_grad():
            weight += way * 0.01 * grad / grad.norm()
        ends.append(loss(1).item())
    assert torch._C._len_torch_function_stack() == 0, "a region was left open"
    return {
        "losses": [each.item() for each in losses],
        "generators": generators,
        "slope": (ends[0] - ends[1]) / 0.02,
        "grad": grad.norm().item(),
        "breaks": list(counters["graph_break"]),
    }


@pytest.mark.parametrize("sequence_parallel", [False, pytest.param(True, marks=pytest.mark.full)])
def test_dropout_inside_the_blocks(sequence_parallel: bool) -> None:
    results = run(2, dropout_case, sequence_parallel)
    for found in results:
        once, again, other = found["losses"]
        assert once == again != other
        assert all("VocabularyColumns.before" in reason for reason in found["breaks"])
        # the backward drops what the forward dropped; both ranks moved, each along its own gradient
        assert found["slope"] == pytest.approx(sum(each["grad"] for each in results), rel=0.01)
    for what in ("losses", "generators"):
        assert results[0][what] == results[1][what], "what is replicated has drifted apart"


def masks_case() -> list[list[bool]]:
    """Run on every rank: which entries two dropouts of a region drop, and one outside it."""
    from tp_plugin.tensor.rng import ShardedRegion

    rank = torch.distributed.get_rank()
    region = ShardedRegion("layers.0.mlp", rank)

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        region.begin(x.device)
        inside = [torch.nn.functional.dropout(x, 0.5) for _ in range(2)]
        region.end()
        return [*inside, torch.nn.functional.dropout(x, 0.5)]

    torch.manual_seed(0)
    torch._dynamo.reset()
    found = torch.compile(forward, backend="aot_eager", fullgraph=True)(torch.ones(64))
    assert all(set(mask.tolist()) == {0.0, 2.0} for mask in found)
    return [mask.bool().tolist() for mask in found]


def test_masks() -> None:
    first, second = run(2, masks_case)
    assert first[0] != first[1] and first[0] != second[0] and first[1] != second[1], "ranks drop the same"
    assert first[2] == second[2], "outside, ranks drop differently"


def attention_case() -> list[float]:
    """Run on one rank: attention with dropout by seed, against autograd through torch's own with the same mask."""
    from tp_plugin.tensor.compiled_dropout import _Seeded, attend, attention

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    settings = (None, 0.3, True, None, True)
    seed = torch.tensor(11)
    ours = attention(*tensors, *settings, seed)
    weights = torch.randn(ours.shape, generator=generator)
    grads = torch.autograd.grad((ours * weights).sum(), tensors)
    before = torch.get_rng_state()
    with _Seeded(tensors[0], seed):
        theirs = attend(*tensors, *settings)
    assert torch.equal(before, torch.get_rng_state())
    expected = torch.autograd.grad((theirs * weights).sum(), tensors)
    pairs = zip((ours, *grads), (theirs, *expected), strict=True)
    return [(a - b).abs().max().item() for a, b in pairs]


def test_attention_by_seed() -> None:
    (found,) = run(1, attention_case)
    assert max(found) <= 1e-6


def _shifted(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)


def _picked(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, ids[..., None])[..., 0]


LOSSES: dict[str, Any] = {
    "cross_entropy": lambda x, ids: F.cross_entropy(*_shifted(x, ids)),
    "cross_entropy and a penalty": lambda x, ids: F.cross_entropy(*_shifted(x, ids)) + 1e-3 * x.logsumexp(-1).mean(),
    "cross_entropy of float32": lambda x, ids: F.cross_entropy(*_shifted(x.float(), ids), reduction="sum") / 20,
    "label smoothing": lambda x, ids: F.cross_entropy(*_shifted(x, ids), label_smoothing=0.1),
    "class dimension": lambda x, ids: F.cross_entropy(x.transpose(1, 2), ids, ignore_index=5),
    "nll_loss": lambda x, ids: F.nll_loss(F.log_softmax(_shifted(x, ids)[0], -1), _shifted(x, ids)[1]),
    "log_softmax and gather": lambda x, ids: -_picked(F.log_softmax(x, -1), ids).mean(),
    "logsumexp": lambda x, ids: (x.logsumexp(-1) - _picked(x, ids)).mean(),
    "softmax": lambda x, ids: _picked(x.softmax(-1), ids).mean(),
    "entropy": lambda x, ids: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "kl_div": lambda x, ids: F.kl_div(x.log_softmax(-1), x.detach().flip(1).softmax(-1), reduction="batchmean"),
    "soft cap": lambda x, ids: F.cross_entropy(*_shifted(3 * torch.tanh(x / 3), ids)),
    "argmax": lambda x, ids: _picked(x, x.argmax(-1)).mean(),
    "topk": lambda x, ids: x.topk(4, -1).values.mean(),
    "max": lambda x, ids: x.max(-1).values.mean(),
    "a product": lambda x, ids: (x @ x.transpose(1, 2)).sigmoid().mean(),
    "squares": lambda x, ids: x.pow(2).mean(),
}
"""What scripts and trainers compile of logits (…, vocabulary) and token ids."""


def compiled_losses(backend: str, as_module: bool, names: tuple[str, ...]) -> dict[str, Any]:
    """Run on every rank: the value, and every gradient, of compiled functions of a sharded model's logits."""
    import tp_plugin

    fresh()
    whole = build(config_for("llama", use_cache=False)).train()
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    layouts, rank = sharded.tp_record.plan.layouts, sharded.tp_record.mesh.tp.rank
    ids, local, found = batch(3)["input_ids"], dict(sharded.named_parameters()), {}
    for name in names:
        torch._dynamo.reset()
        loss = LOSSES[name]
        want = loss(whole(input_ids=ids).logits, ids)
        want.backward()
        target: Any = loss
        if as_module:
            target = torch.nn.Module()
            target.forward = loss
        got = torch.compile(target, backend=backend)(sharded(input_ids=ids).logits, ids)
        got.backward()
        worst = 0.0
        for key, parameter in whole.named_parameters():
            apart = (local[key].grad - layouts[key].shard(parameter.grad, rank)).norm() / parameter.grad.norm()
            worst = max(worst, apart.item())
        found[name] = abs(got.item() - want.item()) / abs(want.item()), worst
        whole.zero_grad()
        sharded.zero_grad()
    return found


OTHERS = [pytest.param(backend, marks=pytest.mark.full) for backend in ("eager", "inductor")]


@pytest.mark.parametrize("backend", ["aot_eager", *OTHERS])
def test_compiled_losses(backend: str) -> None:
    """Their gradients were lost: dynamo traced what a deferred tensor does, without its nodes in autograd's graph."""
    for found in run(2, compiled_losses, backend, False, tuple(LOSSES)):
        assert not {name: apart for name, apart in found.items() if not (apart[0] <= 1e-5 and apart[1] <= 1e-4)}


def test_a_compiled_loss_module() -> None:
    for found in run(2, compiled_losses, "aot_eager", True, ("cross_entropy", "logsumexp")):
        assert all(value <= 1e-5 and gradient <= 1e-4 for value, gradient in found.values()), found
