"""Compiled collectives begin in one order on all ranks, also where shards are uneven; none is in a CUDA graph."""

from __future__ import annotations

import copy
import unittest.mock
from typing import Any

import pytest
import torch
from models import build, config_for
from workers import run
from zoo import fresh

from tp_plugin.mesh.groups import Group

UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 75, "use_cache": False}


def two_sums_case(backend: str) -> list[tuple[int, ...]]:
    """Run on every rank: the order of sums of which none needs another, in a graph whose sizes differ by rank."""
    fresh()
    group = Group("tp", [0, 1], torch.distributed.group.WORLD)
    small, large = (8, 4096) if group.rank == 0 else (4096, 8)
    ran: list[tuple[int, ...]] = []

    def noted(self: Group, tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        ran.append(tuple(tensor.shape))  # and nothing is sent: ranks that disagree would hang
        return tensor

    def forward(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = (x @ w).sin(), (x @ v).cos()
        first, second = group.summed(a.sum(1)), group.summed(b.sum(1, keepdim=True))
        return first, second, group.summed((a @ w.t()).sum(1)[None])

    torch._dynamo.reset()
    with unittest.mock.patch.object(Group, "all_reduce", noted):
        x, w, v = torch.randn(64, 32), torch.randn(32, small), torch.randn(32, large)
        torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)(x, w, v)
    return ran


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_programs_order(backend: str) -> None:
    """Inductor frees the largest tensor first: it ran the third sum before the second on one rank only."""
    assert run(2, two_sums_case, backend) == [[(64,), (64, 1), (1, 64)]] * 2


def model_case(model_type: str, backend: str, sequence_parallel: bool, checkpoints: bool) -> tuple[list[Any], float]:
    """Run on every rank: the collectives of a compiled training step of three heads, and how far its gradients are."""
    import tp_plugin

    fresh(sequence_parallel=sequence_parallel)
    torch._dynamo.reset()
    extra = {} if model_type.startswith("gpt") else UNEVEN
    whole = build(config_for(model_type, **extra)).train()
    if checkpoints:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)
    ran: list[Any] = []
    enter = Group._enter

    def noted(self: Group, op: str, tensor: torch.Tensor | None) -> list[Any]:
        if self.role == "tp":
            assert tensor is not None
            ran.append((op, tuple(tensor.shape)))
        return enter(self, op, tensor)

    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with unittest.mock.patch.object(Group, "_enter", noted):
        torch.compile(sharded, backend=backend)(input_ids=ids, labels=ids).loss.backward()
    whole(input_ids=ids, labels=ids).loss.backward()
    layouts, rank = sharded.tp_record.plan.layouts, torch.distributed.get_rank()
    apart = 0.0
    for (name, parameter), mine in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        want = layouts[name].shard(parameter.grad, rank)
        apart = max(apart, ((mine.grad - want).norm() / parameter.grad.norm()).item())
    return ran, apart


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "model_type, backend, sequence_parallel, checkpoints",
    [
        ("olmo2", "aot_eager", False, False),  # sums over its norms of queries and of keys
        ("olmo2", "inductor", False, False),
        pytest.param("olmo2", "inductor", False, True, marks=FULL),
        pytest.param("qwen3", "inductor", True, False, marks=FULL),
    ],
)
def test_uneven_heads(model_type: str, backend: str, sequence_parallel: bool, checkpoints: bool) -> None:
    results = run(2, model_case, model_type, backend, sequence_parallel, checkpoints)
    assert results[0][0] == results[1][0], "collectives in another order"
    assert len(results[0][0]) > 8
    assert all(apart <= 1e-4 for _, apart in results)


def test_no_cuda_graph_holds_them() -> None:
    """Inductor asks an operator's tags whether a CUDA graph may capture it."""
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    from tp_plugin.mesh.traced_ops import OPERATORS
    from tp_plugin.tensor import compiled_dropout

    seeded = (compiled_dropout.dropout, compiled_dropout.attention, compiled_dropout.attention_backward)
    for operator in (*OPERATORS, *(each._opoverload for each in seeded)):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(operator, (graph.placeholder("x"),)))
        found = get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph))
        assert found is not None and found.target is operator
