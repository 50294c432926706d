"""Attempts to break the illusion of one process: each case failed before it was fixed."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
import time
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from test_parallel import GQA, pair, rank
from torch import nn
from workers import run

# --- the clock of the weights ---------------------------------------------------------------------------------------


def fused_case() -> list[float]:
    """A fused step counts no in-place version; a ``state_dict`` behind it must not be the one from before."""
    whole, sharded = pair(2, **GQA)
    optimizers = []
    for model in (whole, sharded):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name)
        optimizers.append(
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, fused=True)
        )
        model(**batch(97, 0)).loss.backward()
    earlier = sharded.state_dict()  # alive, as a script's best weights are
    for optimizer in optimizers:
        optimizer.step()
    state, expected = sharded.state_dict(), whole.state_dict()
    moved = max((state[name] - earlier[name]).abs().max().item() for name in state)
    return [moved, max((state[name] - expected[name]).abs().max().item() for name in state)]


def test_a_fused_step_is_a_step() -> None:
    for moved, apart in run(2, fused_case):
        assert moved > 5e-3 and apart < 1e-5


def lone_optimizer_case() -> bool:
    """An optimizer of something else may step on one rank alone: the model's weights have not moved."""
    _, sharded = pair(2)
    if rank() == 0:
        other = nn.Linear(2, 2)
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.AdamW(other.parameters()).step()
    return len(sharded.state_dict()) > 0


def test_an_optimizer_of_another_model_is_no_step() -> None:
    assert run(2, lone_optimizer_case) == [True, True]


# --- replicas that are some rounding apart --------------------------------------------------------------------------


def ulp_case() -> dict[str, Any]:
    """One replicated weight differs by one ulp on two ranks: a save takes the leader's, at once."""
    _, sharded = pair(2)
    weight = sharded.model.norm.weight
    with torch.no_grad():
        mine = torch.nextafter(weight, torch.full_like(weight, torch.inf)) if rank() == 1 else weight.clone()
        weight.copy_(mine)
    started = time.monotonic()
    state = sharded.state_dict()
    return {"seconds": time.monotonic() - started, "norm": state["model.norm.weight"].clone(), "mine": mine}


def test_a_save_does_not_depend_on_the_last_bit() -> None:
    leader, peer = run(2, ulp_case)
    assert not torch.equal(leader["mine"], peer["mine"])
    assert torch.equal(leader["norm"], leader["mine"])
    assert max(leader["seconds"], peer["seconds"]) < 10


def drift_case(by: float, repair: bool) -> tuple[str, bool]:
    from tp_plugin.errors import DivergenceError
    from tp_plugin.shard.audit import audit

    _, sharded = pair(2)
    weight = sharded.model.norm.weight
    with torch.no_grad():
        weight.mul_(1 + by * rank())
    message = ""
    try:
        audit(sharded.tp_record, 1e-5, repair)
    except DivergenceError as error:
        message = str(error)
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, weight.detach())
    return message, torch.equal(*everyone)


def test_the_audit_tells_rounding_from_drift_and_repairs() -> None:
    assert run(2, drift_case, 1e-7, False) == [("", False)] * 2
    for message, _ in run(2, drift_case, 1e-2, False):
        assert "'model.norm.weight' has drifted apart within the TP group, by 0.01 of its largest element" in message
    assert run(2, drift_case, 1e-2, True) == [("", True)] * 2


# --- hooks that a script puts on modules ----------------------------------------------------------------------------

PARALLEL = ["gpt_neox", "gptj", "phi", "falcon", "cohere"]
OUTPUTS = ("attention", "attn", "self_attn", "self_attention", "mlp")


def watched_case(model_type: str, before: bool) -> float:
    """What hooks on attention and MLP see, put there before or after the model is sharded; relative to the plain's."""
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    whole = build(config_for(model_type))
    sharded = copy.deepcopy(whole)
    torch_utils.install()

    def watch(model: nn.Module) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[path] = (output[0] if isinstance(output, tuple) else output).detach().clone()

            return hook

        for path, module in model.named_modules():
            if path.rpartition(".")[2] in OUTPUTS:
                module.register_forward_hook(note(path))
        return seen

    expected = watch(whole)
    if before:
        found = watch(sharded)
    parallelize(sharded, 2)
    if not before:
        found = watch(sharded)
    for model in (whole, sharded):
        model(**batch(97, 0))
    assert len(expected) == len(found) == 4
    return max(((found[path] - expected[path]).norm() / expected[path].norm()).item() for path in expected)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("model_type", PARALLEL)
def test_hooks_see_what_one_process_gives(model_type: str, before: bool) -> None:
    assert max(run(2, watched_case, model_type, before)) < 1e-5


# --- whatever a linear's forward is ---------------------------------------------------------------------------------


class Doubled(nn.Linear):
    """A linear of an architecture's own, with an argument that nn.Linear has not."""

    def forward(self, x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        return super().forward(x * times) / times


def linear_case(how: str) -> list[float]:
    """Every linear of an MLP has another forward than its class's when the model is sharded."""
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    config = config_for("llama", mlp_bias=True)
    whole = build(config)
    models = [whole, copy.deepcopy(whole)]
    torch_utils.install()
    for model in models:
        for module in [m for m in model.modules() if type(m) is nn.Linear and m is not model.lm_head]:
            if how == "instance":  # as ms-swift, kernels packages and hook libraries do
                plain = module.forward
                module.forward = lambda x, plain=plain: plain(x.float()).to(x.dtype)
            elif how == "class":
                module.__class__ = Doubled
    if how == "class":
        import dataclasses

        from tp_plugin.policy import policy_for

        policy = dataclasses.replace(policy_for(config), linears=("Doubled",))
        parallelize(models[1], 2, policy)
    else:
        parallelize(models[1], 2)
    seen = []
    for model in models:
        loss = model(**batch(97, 0)).loss
        loss.backward()
        seen.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()))
    (loss, norm), (tp_loss, tp_norm) = seen
    return [abs(loss - tp_loss) / loss, abs(norm - tp_norm) / norm]


@pytest.mark.parametrize("how", ["instance", "class"])
def test_the_reduction_happens_whatever_the_forward_is(how: str) -> None:
    for apart in run(2, linear_case, how):
        assert max(apart) < 1e-5


def copied_case() -> float:
    """A deep copy computes with its own weights, not with the original's."""
    _, sharded = pair(2)
    copied = copy.deepcopy(sharded)
    with torch.no_grad():
        expected = copied(**batch(97, 0)).loss
        for parameter in sharded.parameters():
            parameter.zero_()
        return abs(copied(**batch(97, 0)).loss - expected).item()


def test_a_copied_model_has_its_own_forwards() -> None:
    assert run(2, copied_case) == [0.0, 0.0]


# --- peers and strangers --------------------------------------------------------------------------------------------


def stranger_case() -> float:
    """Idle connections of somebody who knows no key keep no peer waiting."""
    _, sharded = pair(2)
    address = sharded.tp_record.runtime.transport._listener.address
    idle = [socket.create_connection(address) for _ in range(5)]
    torch.distributed.barrier()
    started = time.monotonic()
    state = sharded.state_dict()
    seconds = time.monotonic() - started
    with contextlib.suppress(OSError):
        idle[0].sendall(b"\0" * 64)
    for connection in idle:
        connection.close()
    return seconds if len(state) else -1.0


def test_a_stranger_blocks_nobody() -> None:
    assert all(0 <= seconds < 5 for seconds in run(2, stranger_case))


def reads_case() -> dict[str, Any]:
    """Each shard is read once; before each read some elements of replicas are compared, never whole tensors."""
    from tp_plugin.runtime.published import PublishedTensors
    from tp_plugin.shard import model_state

    _, sharded = pair(2)
    counts = {"reads": 0, "elements": 0, "threads": set()}
    answer, sample = PublishedTensors._answer, model_state.ModelState._sample

    def counted(self: Any, *args: Any) -> torch.Tensor:
        counts["reads"] += 1
        counts["threads"].add(threading.current_thread() is threading.main_thread())
        return answer(self, *args)

    def sampled(self: Any) -> list[float]:
        found = sample(self)
        counts["elements"] = max(counts["elements"], len(found))
        return found

    record = sharded.tp_record
    record.runtime.transport.serve_tensor("read", lambda *args: counted(record.runtime.published, *args))
    model_state.ModelState._sample = sampled
    try:
        torch.distributed.barrier()
        sharded.state_dict()
        torch.distributed.barrier()
    finally:
        model_state.ModelState._sample = sample
    split = {id(p) for n, p in sharded.named_parameters() if record.index.layouts[n].is_sharded}
    return {**counts, "split": len(split)}


def test_a_save_reads_each_shard_once() -> None:
    for found in run(2, reads_case):
        assert found["reads"] == found["split"] and found["threads"] == {False}
        assert 0 < found["elements"] <= 64 * 16


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


def placement_case() -> str:
    from torch.distributed import fsdp
    from torch.distributed.tensor import Shard

    from tp_plugin.engines.fsdp2 import wrapping
    from tp_plugin.errors import TPError

    _, sharded = pair(2)
    try:
        patched = getattr(fsdp.fully_shard, "tp_patched", False)  # by a case before
        plain = fsdp.fully_shard.__wrapped__ if patched else fsdp.fully_shard
        wrapping._fully_shard(plain, sharded, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    except TPError as error:
        return str(error)
    return ""


def test_fsdp2_may_split_rows_only() -> None:
    for message in run(4, placement_case):
        assert "shard_placement_fn splits dimension 1 of 'model.embed_tokens.weight'" in message
