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


def expect(error: str, function: Any) -> str:
    from tp_plugin.errors import DivergenceError

    try:
        function()
    except DivergenceError as raised:
        return str(raised)
    raise AssertionError(f"{error} was not noticed")


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
