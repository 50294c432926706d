"""What the ranks of a TP group do together: norms, randomness, guard, audit, whole weights (oracle: one process)."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, build, config_for
from workers import run

GQA = {"num_attention_heads": 4, "num_key_value_heads": 1}


def pair(tp: int, model_type: str = "llama", seed: int = 0, options: Any = None, **overrides: Any) -> tuple[Any, Any]:
    """A plain model and its sharded copy, on a fresh mesh."""
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(0)
    whole = build(config_for(model_type, **overrides), seed)
    sharded = copy.deepcopy(whole)
    torch_utils.install()
    parallelize(sharded, tp, options=options)
    return whole, sharded


def rank() -> int:
    return torch.distributed.get_rank()


# --- norms ----------------------------------------------------------------------------------------------------------


def norms_case(norm_type: float) -> tuple[float, float, float, float]:
    whole, sharded = pair(2, **GQA)
    for model in (whole, sharded):
        model.model.norm.weight.requires_grad_(False)
        model(**batch(97, 0)).loss.backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (whole, sharded)]
    some = [[p.grad for n, p in model.named_parameters() if "mlp" in n] for model in (whole, sharded)]
    from torch.nn.utils import get_total_norm

    return (
        *(get_total_norm(g, norm_type).item() for g in grads),
        *(get_total_norm([x.detach() for x in g], norm_type).item() for g in some),
    )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf")])
def test_total_norm_is_the_whole_models(norm_type: float) -> None:
    # the sharded model's call runs beside the plain one's: its tensors belong to no sharded model
    for whole, sharded, mlp, sharded_mlp in run(2, norms_case, norm_type):
        assert sharded == pytest.approx(whole, rel=1e-5)
        assert sharded_mlp == pytest.approx(mlp, rel=1e-5)


def scaler_case() -> tuple[bool, float]:
    _, sharded = pair(2)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sharded(**batch(97, 0)).loss).backward()
    before = sharded.model.norm.weight.clone()
    if rank() == 1:
        sharded.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(before, sharded.model.norm.weight), scaler.get_scale()


def test_an_inf_in_one_shard_skips_the_step_everywhere() -> None:
    assert run(2, scaler_case) == [(True, 4.0)] * 2


# --- randomness -----------------------------------------------------------------------------------------------------


def dropout_case(reentrant: bool | None) -> dict[str, Any]:
    """GPT-2 with dropout in both regions, generators unequal at first; with checkpointing if not None."""
    _, sharded = pair(2, "gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3, attn_implementation="eager")
    sharded.train()
    if reentrant is not None:
        sharded.gradient_checkpointing_enable({"use_reentrant": reentrant})
    masks: list[torch.Tensor] = []
    for block in sharded.transformer.h:  # eager attention returns its weights after dropout
        block.attn.register_forward_hook(lambda module, args, out: masks.append(out[1] == 0))
    torch.manual_seed(7 + rank())
    hidden = sharded(**batch(97, 0), output_hidden_states=True)
    hidden.loss.backward()
    return {
        "hidden": [h.detach().clone() for h in hidden.hidden_states],
        "masks": masks,
        "state": torch.get_rng_state(),
        "grad": sharded.transformer.ln_f.weight.grad.clone(),
    }


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout(reentrant: bool | None) -> None:
    one, two = run(2, dropout_case, reentrant)
    assert all(torch.equal(a, b) for a, b in zip(one["hidden"], two["hidden"], strict=True)), "replicated parts differ"
    assert torch.equal(one["state"], two["state"]) and torch.equal(one["grad"], two["grad"])
    assert not torch.equal(one["masks"][0], two["masks"][0]), "sharded dropout is the same on both ranks"
    assert not torch.equal(one["masks"][0], one["masks"][1]), "two layers drew the same mask"
    if reentrant is not None:
        assert len(one["masks"]) == 4
        for result in (one, two):  # the recomputation runs the layers in reverse
            assert torch.equal(result["masks"][0], result["masks"][3])
            assert torch.equal(result["masks"][1], result["masks"][2])


def replicated_dropout_case() -> tuple[float, float]:
    whole, sharded = pair(2, "gpt2", resid_pdrop=0.2, embd_pdrop=0.2)
    losses = []
    for model in (whole, sharded):
        model.train()
        torch.manual_seed(3)
        losses.append(sum(model(**batch(97, seed)).loss.item() for seed in range(3)))
    return losses[0], losses[1]


def test_replicated_dropout_draws_what_one_process_draws() -> None:
    for whole, sharded in run(2, replicated_dropout_case):
        assert sharded == pytest.approx(whole, rel=1e-5)


# --- guard and audit ------------------------------------------------------------------------------------------------


def expect(error: str, function: Any) -> str:
    from tp_plugin.errors import DivergenceError

    try:
        function()
    except DivergenceError as raised:
        return str(raised)
    raise AssertionError(f"{error} was not noticed")


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


# --- one model on all ranks -----------------------------------------------------------------------------------------


def other_seed_case() -> dict[str, torch.Tensor]:
    _, sharded = pair(2, seed=rank())
    return sharded.state_dict()


def test_the_leaders_weights_are_taken() -> None:
    reference = build(config_for("llama"), seed=0).state_dict()
    for state in run(2, other_seed_case):
        assert all(torch.equal(state[name], reference[name]) for name in reference)


def wrapper_case() -> tuple[bool, bool, int]:
    """A wrapper with a head of its own, initialised differently on each rank, passed twice."""
    import copy

    from tp_plugin.shard import parallelize

    pair(2)
    whole = build(config_for("llama"), seed=rank())
    torch.manual_seed(rank())
    wrapper = torch.nn.ModuleDict({"backbone": whole, "head": torch.nn.Linear(48, 3)})
    before = copy.deepcopy(wrapper.state_dict())
    parallelize(wrapper, 2)
    parallelize(wrapper, 2)  # prepare() and prepare_model() both come here
    state = wrapper.state_dict()
    leaders = [torch.equal(state[name], before[name]) for name in before]
    return all(leaders), torch.equal(before["head.weight"], state["head.weight"]), hash(state["head.bias"].tolist()[0])


def test_a_wrapper_is_the_leaders_too_and_sharding_twice_does_nothing() -> None:
    leader, peer = run(2, wrapper_case)
    assert leader[:2] == (True, True) and peer[1] is False and leader[2] == peer[2]


def another_tp_case() -> str:
    from tp_plugin.errors import TPError
    from tp_plugin.shard import parallelize

    pair(2)
    with contextlib.suppress(TPError):
        parallelize(build(config_for("llama")), 4)
        return "accepted"
    return "refused"


def test_a_second_model_with_another_tp_is_refused() -> None:
    assert run(4, another_tp_case) == ["refused"] * 4


# --- whole weights --------------------------------------------------------------------------------------------------


def states_case() -> dict[str, Any]:
    whole, sharded = pair(2, tie_word_embeddings=True, **GQA)
    found: dict[str, Any] = {}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (whole, sharded)]
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard import shard_optimizer

    shard_optimizer(optimizers[1], require())
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        model(**batch(97, 0)).loss.backward()
        optimizer.step()
    states = [m.state_dict() for m in (whole, sharded)]
    found["tied"] = states[1]["lm_head.weight"] is states[1]["model.embed_tokens.weight"]
    found["part"] = torch.allclose(sharded.model.layers[0].state_dict()["mlp.up_proj.weight"],
                                   whole.model.layers[0].mlp.up_proj.weight, atol=1e-5)  # fmt: skip
    moments = [o.state_dict()["state"] for o in optimizers]
    found["moments"] = max(
        (moments[0][i][k] - moments[1][i][k]).abs().max().item() for i in moments[0] for k in ("exp_avg", "exp_avg_sq")
    )
    # back in: another sharded model and optimizer take the whole states and go on alike
    other = copy.deepcopy(sharded)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    found["missing"] = str(other.load_state_dict(states[1]))
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other(**batch(97, 0)).loss.backward()  # the copy's gradients sum over replicas too
    shard_optimizer(resumed, require())
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))  # torch shares tensors otherwise
    for model, optimizer in ((sharded, optimizers[1]), (other, resumed), (whole, optimizers[0])):
        optimizer.zero_grad()
        model(**batch(97, 1)).loss.backward()
        optimizer.step()
    found["resumed"] = max(
        (a - b).abs().max().item() for a, b in zip(other.parameters(), sharded.parameters(), strict=True)
    )
    after = [m.state_dict() for m in (whole, other)]
    found["continued"] = max((after[0][k] - after[1][k]).abs().max().item() for k in after[0])
    found["copy state is its own"] = after[1]["model.norm.weight"].data_ptr() != sharded.model.norm.weight.data_ptr()
    return found


def test_state_dicts_are_whole_and_go_back_in() -> None:
    for found in run(2, states_case):
        assert found["tied"] and found["part"] and found["copy state is its own"]
        assert found["missing"] == "<All keys matched successfully>"
        assert found["moments"] <= 1e-6 and found["resumed"] == 0.0 and found["continued"] <= 3e-4


def moved_on_case(counted: bool) -> str:
    from tp_plugin.runtime import published

    _, sharded = pair(2)
    published.PATIENCE = 1.0
    try:
        if rank() == 0:
            message = expect("a peer that changed its weights", sharded.state_dict)
        else:
            with torch.no_grad():
                weight = sharded.model.norm.weight
                (weight if counted else weight.data).mul_(2)  # as an EMA swap does, while the leader saves
            message = ""
        torch.distributed.barrier()
    finally:
        published.PATIENCE = 30.0
    return message


@pytest.mark.parametrize("counted", [True, False])
def test_a_peer_that_moved_on_is_an_error_not_a_corrupt_checkpoint(counted: bool) -> None:
    message, _ = run(2, moved_on_case, counted)
    assert "cannot read" in message
    assert ("another point of the program" if counted else "changed on one rank alone, or have drifted") in message


def lagging_case() -> bool:
    import time

    whole, sharded = pair(2)
    if rank() == 1:
        time.sleep(1.0)
    with torch.no_grad():
        for model in (whole, sharded):
            for parameter in model.parameters():
                parameter.data.mul_(0.5)
    state = sharded.state_dict() if rank() == 0 else None
    torch.distributed.barrier()
    return state is None or all(torch.equal(state[k], v) for k, v in whole.state_dict().items())


def test_a_peer_that_lags_is_waited_for() -> None:
    assert run(2, lagging_case) == [True, True]


def lbfgs_case() -> str:
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard import shard_optimizer

    _, sharded = pair(2)
    with pytest.raises(TPError) as raised:
        shard_optimizer(torch.optim.LBFGS(sharded.parameters()), require())
    return str(raised.value)


def test_optimizers_that_look_at_whole_tensors_are_refused() -> None:
    assert all("optimizer LBFGS looks at whole tensors" in message for message in run(2, lbfgs_case))


def cross_attention_case() -> float:
    whole, sharded = pair(2, "gpt2", add_cross_attention=True)
    encoder = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    grads = []
    for model in (whole, sharded):
        memory = encoder.clone().requires_grad_()
        model(**batch(97, 0), encoder_hidden_states=memory).loss.backward()
        grads.append((memory.grad, model.transformer.ln_f.weight.grad, model.transformer.wpe.weight.grad))
    return max(((b - a).norm() / a.norm()).item() for a, b in zip(*grads, strict=True))


def test_cross_attention_gradients_reach_the_encoder_whole() -> None:
    assert all(deviation <= 1e-4 for deviation in run(2, cross_attention_case))
