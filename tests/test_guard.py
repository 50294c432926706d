"""What the batch guard and the audit see: other batches, losses, places and weights on the ranks of a TP group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch
from test_parallel import GQA, expect, pair, rank
from workers import run


def other_batch_case() -> str:
    _, sharded = pair(2)
    sharded(**batch(97, 0))
    return expect("another batch", lambda: sharded(**batch(97, seed=rank())))


def test_guard_names_the_input_that_differs() -> None:
    for message in run(2, other_batch_case):
        assert "forward 2, TP group of ranks [0, 1]" in message
        assert "'attention_mask'" not in message and "'input_ids' differs" in message
        assert "accelerator.prepare" in message


def other_shape_case() -> str:
    _, sharded = pair(2)
    return expect("another length", lambda: sharded(**batch(97, 0, length=8 + rank())))


def test_guard_sees_another_shape_before_any_collective_mismatches() -> None:
    for message in run(2, other_shape_case):
        assert "rank 0: torch.int64 [2, 8]" in message and "rank 1: torch.int64 [2, 9]" in message


def other_loss_case(factor: float) -> str:
    """A penalty on all weights, of which each rank sees its share."""
    _, sharded = pair(2)
    for seed in range(2):
        sharded(**batch(97, seed)).loss.backward()
    loss = sharded(**batch(97, 2)).loss
    (loss + factor * sum(p.pow(2).sum() for p in sharded.parameters())).backward()
    return expect("another loss", lambda: sharded(**batch(97, 3)))


@pytest.mark.parametrize("factor", [0.1, 1e-6])
def test_a_loss_that_is_not_one_number_is_an_error(factor: float) -> None:
    for message in run(2, other_loss_case, factor):
        assert "called backward() on different losses (rank 0: " in message


def clipped_by_hand_case() -> tuple[int, str]:
    """Each rank divides by the norm of its own shares: the replicated weights drift apart, and no loss shows it."""
    from tp_plugin.errors import DivergenceError

    _, sharded = pair(2)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
    for seed in range(20):
        try:
            sharded(**batch(97, seed)).loss.backward()
        except DivergenceError as error:
            return seed, str(error)
        norm = torch.stack([p.grad.pow(2).sum() for p in sharded.parameters()]).sum().sqrt()
        for parameter in sharded.parameters():
            parameter.grad.mul_(0.1 / norm)
        optimizer.step()
        optimizer.zero_grad()
    return 20, ""


def test_drift_is_seen_within_some_steps() -> None:
    for steps, message in run(2, clipped_by_hand_case):
        assert steps <= 7 and "has drifted apart" in message and "clip_grad_norm_ sees the whole model" in message


def rounded_case(change: float) -> str:
    """Rank 1's copy of a norm's weight is a little apart, as after months of sums in any order."""
    from tp_plugin.errors import DivergenceError

    _, sharded = pair(2)
    with torch.no_grad():
        sharded.model.norm.weight.mul_(1 + change * rank())
    sharded.model(batch(97, 0)["input_ids"]).last_hidden_state.pow(2).mean().backward()  # no sum over ranks behind it
    try:
        sharded(**batch(97, 1))
    except DivergenceError as error:
        return str(error)
    return ""


def test_losses_may_be_apart_by_what_rounding_did_to_the_weights() -> None:
    assert run(2, rounded_case, 5e-6) == ["", ""]
    for message in run(2, rounded_case, 1e-3):
        assert "called backward() on different losses (rank 0: " in message


def learned_mask_case() -> str:
    from tp_plugin.errors import TPError

    _, sharded = pair(2)
    data = batch(97, 0)
    bias = torch.zeros(2, 1, 11, 11, requires_grad=True)
    with pytest.raises(TPError) as raised:
        sharded(**data | {"attention_mask": bias})
    assert sharded(**data | {"attention_mask": bias.detach()}).loss.isfinite()
    return str(raised.value)


def test_a_learned_mask_is_refused() -> None:
    for message in run(2, learned_mask_case):
        assert message.startswith("'attention_mask' requires a gradient")


def other_place_case() -> str:
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    _, sharded = pair(2)
    if rank() == 0:
        return expect("a lone training forward", lambda: sharded(**batch(97, 0)))
    return expect("a lone barrier", lambda: require().sync_points.rendezvous(BARRIER))


def test_ranks_at_different_places_are_told_at_once() -> None:
    for message in run(2, other_place_case):
        assert "rank 0 at a forward, rank 1 at wait_for_everyone" in message


def main_only_case() -> dict[str, Any] | None:
    """The leader evaluates and samples alone, while its peer has dropped its model and waits at a barrier."""
    import gc

    from transformers import GenerationMixin

    from tp_plugin.engines.transformers import _generate
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    whole, sharded = pair(2, **GQA)
    sync_points = require().sync_points
    sync_points.rendezvous(BARRIER)
    prompt = batch(97, 3, size=1, length=4)["input_ids"]
    found: dict[str, Any] = {}
    if rank() == 1:
        del sharded
        gc.collect()
    else:
        sharded.eval(), whole.eval()
        with torch.no_grad():
            found["losses"] = [sum(m(**batch(97, s)).loss.item() for s in range(2)) for m in (whole, sharded)]
        torch.manual_seed(11)
        expected = whole.generate(prompt, max_new_tokens=8, do_sample=True, pad_token_id=0)
        torch.manual_seed(11)
        tokens = _generate(GenerationMixin.generate, sharded, prompt, max_new_tokens=8, do_sample=True, pad_token_id=0)
        found["tokens"] = [expected.tolist(), tokens.tolist()]
    before = torch.get_rng_state()
    sync_points.rendezvous(BARRIER)
    found["generators kept"] = torch.equal(before, torch.get_rng_state())
    return found


def test_evaluation_and_generation_on_the_main_process_alone() -> None:
    leader, peer = run(2, main_only_case)
    assert leader["losses"][1] == pytest.approx(leader["losses"][0], rel=1e-5)
    assert leader["tokens"][0] == leader["tokens"][1]
    assert peer["generators kept"], "helping moved the peer's own generators"


def loader_on_main_case() -> list[list[int]]:
    """Both ranks take an epoch, then the leader alone takes one, while its peer waits at a barrier."""
    import accelerate.data_loader as data_loader
    from accelerate.state import PartialState

    from tp_plugin.engines.accelerate import loaders
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    pair(2)
    loader = data_loader.DataLoaderShard(list(range(5)), batch_size=2)
    plain = vars(data_loader.DataLoaderShard)["__iter__"]
    epochs = [[b.tolist() for b in loaders._iterate(plain, loader)]]
    if rank() == 0:
        epochs.append([b.tolist() for b in loaders._iterate(plain, loader)])
    require().sync_points.rendezvous(BARRIER)
    PartialState._reset_state()  # iterating made one; this worker's next case must not find it
    return epochs


def test_the_main_process_may_iterate_alone() -> None:
    batches = [[0, 1], [2, 3], [4]]
    assert run(2, loader_on_main_case) == [[batches, batches], [batches]]


def collective_case() -> str:
    from tp_plugin.engines.accelerate import operations

    pair(2)
    operations.meet_at("gather")  # all ranks at one: fine
    return expect("two collectives", lambda: operations.meet_at("gather" if rank() else "reduce"))


def test_different_collectives_of_accelerate_are_told_apart() -> None:
    for message in run(2, collective_case):
        assert "came to different collectives of Accelerate" in message


def unequal_case() -> dict[str, Any]:
    """What ranks get that give other values than their leader: chosen by ``is_main_process``, say, or drawn."""
    from tp_plugin.engines.accelerate import operations

    mesh = pair(2)[1].tp_record.mesh
    over = operations.DPScopedDist()
    value = torch.tensor([float(rank()), 1.0])
    gathered = [torch.zeros(2) for _ in range(mesh.dp_size)]
    over.all_gather(gathered, value)
    objects: list[Any] = [None] * mesh.dp_size
    over.all_gather_object(objects, {"rank": rank()})
    summed = value.clone()
    over.all_reduce(summed)
    return {
        "gathered": torch.stack(gathered).tolist(), "objects": objects, "summed": summed.tolist(),
        "mine": value.tolist(),
        "shapes": expect("other shapes", lambda: over.all_gather(gathered, torch.zeros(2 + rank() % 2))),
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_leaders_value_is_the_groups(ranks: int) -> None:
    leaders = list(range(0, ranks, 2))
    for number, found in enumerate(run(ranks, unequal_case)):
        assert found["gathered"] == [[leader, 1.0] for leader in leaders]
        assert found["objects"] == [{"rank": leader} for leader in leaders]
        assert found["summed"] == [sum(leaders), len(leaders)]
        assert found["mine"] == [number, 1.0], "the script's own tensor was changed"
        assert "came to all_gather with values of different shapes" in found["shapes"]


def audit_beside_case() -> str:
    """A home-made head around a sharded model."""
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.shard import parallelize

    whole, _ = pair(2, **GQA)
    model = parallelize(
        torch.nn.ModuleDict({"body": whole, "score": torch.nn.Linear(3, 1)}), 2, options=RunConfig(2, audit_every=1)
    )
    model["body"](**batch(97, 0))
    with torch.no_grad():
        model["score"].bias += rank()
    return expect("a drifted head", lambda: model["body"](**batch(97, 0)))


def audit_case() -> str:
    from tp_plugin.config.run_config import RunConfig

    _, sharded = pair(2, options=RunConfig(2, audit_every=2), **GQA)
    sharded(**batch(97, 0))
    sharded(**batch(97, 0))  # audited, and equal
    with torch.no_grad():
        sharded.model.layers[1].self_attn.k_proj.weight[0, 0] += rank()
    sharded(**batch(97, 0))
    return expect("a drifted replica", lambda: sharded(**batch(97, 0)))


def test_audit_names_the_first_parameter_that_drifted() -> None:
    for message in run(2, audit_case):
        assert "'model.layers.1.self_attn.k_proj.weight' has drifted apart" in message
    for message in run(2, audit_beside_case):
        assert "'score.bias' has drifted apart" in message
