"""TRL's fused head over a split vocabulary, against TRL's own over the whole one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from workers import run

from tp_plugin.tensor.param_entry import ParamEntry, bind

SETTINGS = {
    "plain": {},
    "all": {"temperature": 0.7, "final_logit_softcapping": 2.0, "logit_scale": 0.3},
    "partitioned": {},
    "fused": {"final_logit_softcapping": 2.0},
}


class Gathering:
    """What TRL calls under ZeRO-3: the parameters are there inside of it, and empty between forward and backward."""

    kept: dict[torch.nn.Parameter, torch.Tensor] | None = None

    @contextlib.contextmanager
    def __call__(self, *parameters: torch.nn.Parameter) -> Iterator[None]:
        if self.kept is None:
            yield
            self.kept = {parameter: parameter.data for parameter in parameters}
            for parameter in parameters:
                parameter.data = parameter.data.new_empty(0)
        else:  # DeepSpeed, too, lets them go only after their gradients
            for parameter in parameters:
                parameter.data = self.kept[parameter]
            yield


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def scores_case(kind: str) -> dict[str, Any]:
    from counted import ledger
    from trl.kernels import ChunkedLogProbFunction

    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines.trl import OPTIONAL, _LogProbs
    from tp_plugin.policy import ParamLayout
    from tp_plugin.policy.split import vocabulary_rows
    from tp_plugin.runtime.start import start, stop

    stop()
    group = start(RunConfig(2, fused_head=kind == "fused")).mesh.tp
    torch.manual_seed(0)
    size, width, tokens = 97, 12, 30
    hidden, weight, bias = torch.randn(tokens, width), torch.randn(size, width), torch.randn(size)
    targets = torch.randint(0, size, (tokens,))
    targets[:10] = (hidden @ weight.t() + bias).argmax(-1)[:10]  # some are the largest
    parts, rows = vocabulary_rows(size, 2)
    layout = ParamLayout((size, width), 0, parts, pad_to=rows)
    biases = ParamLayout((size,), 0, parts, pad_to=rows)
    given = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0, **SETTINGS[kind]}
    rest = (given["temperature"], 32, given["final_logit_softcapping"], given["logit_scale"], OPTIONAL)
    results, grads = [], []
    for split in (False, True):
        x = hidden.clone().requires_grad_()
        w, b = (layout.shard(weight, group.rank), biases.shard(bias, group.rank)) if split else (weight, bias)
        w, b = torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())
        if split:
            bind(w, ParamEntry("w", layout))
            bind(b, ParamEntry("b", biases))
        before = {name: dict(book) for name, book in ledger.items()}
        fetched: Any = Gathering() if split and kind == "partitioned" else lambda *_: contextlib.nullcontext()
        with fetched(w, b):
            found = _LogProbs(ChunkedLogProbFunction, fetched).apply(x, w, b, targets, *rest)
        forward = {n: ledger["bytes"][n] - before["bytes"].get(n, 0) for n in ledger["bytes"]}
        weights = torch.linspace(-1, 1, tokens)
        (found[0] * weights + 0.3 * found[1] * weights.flip(0)).sum().backward()
        results.append([None if one is None else one.detach() for one in found])
        gathered = [layout.gather(group.all_gather(w.grad)), biases.gather(group.all_gather(b.grad))] if split else 0
        grads.append([x.grad, *(gathered or [w.grad, b.grad])])
    return {
        "values": [_off(a.float(), b.float()) for b, a in zip(*results, strict=True)],
        "grads": [_off(a, b) for b, a in zip(*grads, strict=True)],
        "top": results[0][4].sum().item(), "bytes": sum(forward.values()) / tokens,
    }  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_scores_are_those_of_the_whole_vocabulary(kind: str) -> None:
    for found in run(2, scores_case, kind):
        assert max(found["values"]) <= 1e-5 and max(found["grads"]) <= 1e-4
        assert found["top"] >= 10
        assert found["bytes"] < 100  # this rank's logits are 4 x 49 bytes per token; all five results cost fewer


def copied_case() -> str:
    from models import build, config_for

    from tp_plugin.engines.trl import _LogProbs
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    head: Any = parallelize(build(config_for("llama", tie_word_embeddings=False)), tp_size=2).lm_head
    with pytest.raises(TPError) as raised:
        _LogProbs(None, None).apply(torch.zeros(1), head.weight.detach().clone(), None, torch.zeros(1), 1.0, 32)
    return str(raised.value)


def test_a_copy_of_a_share_is_not_taken_for_the_whole() -> None:
    for message in run(2, copied_case):
        assert "a weight of (49, 48) that is not a parameter of the model" in message


def distilled_case(beta: float, kind: str) -> dict[str, float]:
    from trl.kernels import chunked_divergence

    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import patching
    from tp_plugin.engines.trl import install_distillation
    from tp_plugin.policy import ParamLayout
    from tp_plugin.policy.split import vocabulary_rows
    from tp_plugin.runtime.start import start, stop

    stop()
    group = start(RunConfig(2, fused_head=kind == "fused")).mesh.tp
    torch.manual_seed(0)
    size, tokens = 97, 30
    parts, rows = vocabulary_rows(size, 2)
    given = []  # of student and teacher, which are of different width
    for width in (12, 20):
        layout = ParamLayout((size, width), 0, parts, pad_to=rows)
        given.append((torch.randn(tokens, width), torch.randn(size, width), torch.randn(size), layout))
    biases = ParamLayout((size,), 0, parts, pad_to=rows)
    rest = (beta, 0.7, 0.3, 2.0, 0.5, None) if kind != "plain" else (beta,)
    results, grads = [], []
    for split in (False, True):
        arguments: list[torch.Tensor] = []
        for hidden, weight, bias, layout in given:
            w, b = (layout.shard(weight, group.rank), biases.shard(bias, group.rank)) if split else (weight, bias)
            x, w, b = hidden.clone().requires_grad_(), torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())
            if split:
                bind(w, ParamEntry("w", layout))
                bind(b, ParamEntry("b", biases))
            arguments += [x, w, b]
        with patching.taken_back():
            install_distillation(chunked_divergence)
            found = chunked_divergence.ChunkedDivergenceFunction.apply(*arguments, *rest)
        (found[0] * torch.linspace(-1, 1, tokens)).sum().backward()
        results.append([one.detach() for one in found])
        x, w, b, *of_teacher = arguments
        assert all(one.grad is None for one in of_teacher) and not found[1].requires_grad
        layout = given[0][3]
        gathered = [layout.gather(group.all_gather(w.grad)), biases.gather(group.all_gather(b.grad))] if split else 0
        grads.append([x.grad, *(gathered or [w.grad, b.grad])])
    return {
        "values": max(_off(a, b) for b, a in zip(*results, strict=True)),
        "grads": max(_off(a, b) for b, a in zip(*grads, strict=True)),
    }


@pytest.mark.parametrize("beta, kind", [(0.0, "plain"), (1.0, "all"), (0.3, "all"), (0.3, "fused")])
def test_distillation_is_that_of_the_whole_vocabulary(beta: float, kind: str) -> None:
    for found in run(2, distilled_case, beta, kind):
        assert found["values"] <= 1e-5 and found["grads"] <= 1e-4


def one_split_case() -> str:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines.trl import _divergence
    from tp_plugin.errors import TPError
    from tp_plugin.policy import ParamLayout
    from tp_plugin.runtime.start import start, stop

    stop()
    start(RunConfig(2))
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    bind(weight, ParamEntry("w", ParamLayout((4, 3), 0, (((0, 2),), ((2, 4),)))))
    x = torch.zeros(1, 3)
    with pytest.raises(TPError) as raised:
        _divergence(None, None, x, weight, None, x, torch.zeros(4, 3), None, 0.5)
    return str(raised.value)


def test_one_split_head_of_two_is_refused() -> None:
    assert all("where student and teacher are both split" in said for said in run(2, one_split_case))


def gkd_case(beta: float) -> dict[str, float]:
    from models import build, config_for
    from trl.experimental.gkd import GKDTrainer

    import tp_plugin
    from tp_plugin.runtime.start import stop

    stop()
    ids = torch.arange(3, 33).view(2, 15)
    labels = ids.masked_fill(torch.arange(15) < 4, -100)[:, 1:]
    models: list[Any] = [build(config_for("llama", tie_word_embeddings=False)) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter *= 0.8

    def step(student: Any, teacher: Any) -> tuple[float, dict[str, torch.Tensor]]:
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[:, :-1]
        logits = student(input_ids=ids).logits[:, :-1]
        loss = GKDTrainer.generalized_jsd_loss(logits, wanted, labels, beta=beta, num_items_in_batch=20)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters()}

    loss, grads = step(*models)
    models[0].zero_grad()
    student, teacher = (tp_plugin.parallelize(model, tp_size=2) for model in models)
    found, shares = step(student, teacher)
    rank = torch.distributed.get_rank()
    layouts = {name: p.tp_entry.layout for name, p in student.named_parameters()}
    return {
        "loss": abs(found - loss) / loss,
        "grads": max(
            ((shares[name] - layouts[name].shard(whole, rank)).norm() / whole.norm()).item()
            for name, whole in grads.items()
        ),
    }


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gkd_is_that_of_the_whole_vocabulary(beta: float) -> None:
    for found in run(2, gkd_case, beta):
        assert found["loss"] <= 1e-5 and found["grads"] <= 1e-4


def rewards_case() -> list[float]:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import patching
    from tp_plugin.engines.trl import install_rewards
    from tp_plugin.runtime.start import start, stop

    class GRPOTrainer:
        def _calculate_rewards(self, count: int) -> torch.Tensor:
            return torch.full((count,), float(torch.distributed.get_rank()))  # a judge that each rank asks for itself

    stop()
    start(RunConfig(2))
    install_rewards(type("module", (), {"GRPOTrainer": GRPOTrainer}))
    try:
        return GRPOTrainer()._calculate_rewards(3).tolist()
    finally:
        owner, name, original = patching._originals.pop()
        patching.put_back(owner, name, original)


def test_a_group_has_one_reward() -> None:
    assert run(4, rewards_case) == [[0.0] * 3] * 2 + [[2.0] * 3] * 2
