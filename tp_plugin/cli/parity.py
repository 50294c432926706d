"""The proof of a policy: the sharded model trained beside the whole one, on local gloo ranks.

The first rank trains both. Compared are: outputs of all modules that are whole on every rank, losses, every gradient,
the gradient norm, weights after clipped AdamW steps, greedy generation, the checkpoint as plain transformers
reloads it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import math
import os
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from torch import nn

from tp_plugin.cli import hints
from tp_plugin.cli.inputs import loss_of, prompt
from tp_plugin.cli.target import build, named_policy
from tp_plugin.errors import TPError
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy import Plan, Policy, policy_for
from tp_plugin.runtime.current import require

if TYPE_CHECKING:
    from tp_plugin.cli.dropout import Dropout

TIMEOUT = 120
STEPS, MICRO, CLIP = 3, 2, 0.5
LIMITS = {"output": 1e-4, "loss": 1e-5, "gradient": 1e-4, "norm": 1e-5, "weight": 3e-4}
"""Largest deviations in fp32: relative, except of weights (absolute, after the steps)."""


@dataclass
class Result:
    """Deviations of one rank; ``where`` names the module or parameter of each, ``hints`` say what may be wrong there.

    ``collectives`` are those of one forward and backward by operation and group, ``sent`` the bytes that a rank puts
    into them, ``moved`` is how far training took the weights (a model that does not move proves nothing).
    """

    output: float = 0.0
    loss: float = 0.0
    gradient: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    where: dict[str, str] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)
    generation: bool | None = None
    state: bool | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    moved: float = 0.0
    dropout: Dropout | None = None

    def failures(self) -> list[str]:
        """What is beyond its limit, each with the place."""
        found = [
            f"{kind} deviates by {getattr(self, kind):.1e} (limit {limit:.0e}) at {self.where.get(kind, '?')}"
            + (f"; {self.hints[kind]}" if self.hints.get(kind) else "")
            for kind, limit in LIMITS.items()
            if not getattr(self, kind) <= limit
        ]
        if self.generation is False:
            found.append("greedy generation gives other tokens")
        if self.state is False:
            found.append(f"the saved state differs from the whole model's: {self.where.get('state')}")
        if self.dropout is not None:
            found += self.dropout.faults
        return found


def prove(config: Any, reference: str | None, tp: int) -> list[Result]:
    """Results of ``tp`` local ranks, for the policy that ``reference`` names (default: the registered one).

    Raises:
        TPError: a rank raised or hung; the message has its traceback.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, tp, port, config, reference, results), daemon=True)
        for rank in range(tp)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < tp:
            rank, answer = results.get(timeout=TIMEOUT)
            if isinstance(answer, TPError):
                raise answer
            if isinstance(answer, str):
                raise TPError(f"rank {rank} of {tp} failed:\n{answer}")
            answers[rank] = answer
    except queue.Empty:
        raise TPError(f"ranks {sorted(set(range(tp)) - set(answers))} gave no answer in {TIMEOUT} s") from None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [answers[rank] for rank in range(tp)]


def _rank(rank: int, tp: int, port: int, config: Any, reference: str | None, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(tp))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
        results.put((rank, prove_here(config, reference, tp)))
        torch.distributed.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def prove_here(config: Any, reference: str | None, tp: int) -> Result | TPError:
    """This rank's part of :func:`prove`; an error that has a message of its own is given, not raised."""
    from tp_plugin.cli.dropout import prove_dropout  # which stands on this module

    try:
        policy = named_policy(reference) if reference else policy_for(config)
        result = compare(config, policy, tp)
        if not any(require().mesh.unit_cpu.gather_objects(bool(result.failures()))):
            result.dropout = prove_dropout(config, policy, tp)
        return result
    except TPError as error:
        return TPError(str(error))  # without its cause, which need not pickle


def compare(config: Any, policy: Policy, tp: int, steps: int = STEPS) -> Result:
    """Run on every rank of an initialised world of ``tp``: the sharded model against the whole one on its first rank.

    Every rank compares what it holds with its share of the whole model's, so that replicas that drift are seen, too.
    """
    import tp_plugin

    sharded = build(config, meta=False)
    whole = copy.deepcopy(sharded) if torch.distributed.get_rank() == 0 else nn.Module()
    tp_plugin.parallelize(sharded, tp_size=tp, policy=policy)
    mesh, plan = require().mesh, sharded.tp_record.plan  # type: ignore[union-attr]
    result = Result()

    expected = on_one_rank(mesh, lambda: _reference(whole, plan, steps))
    _compare_outputs(sharded, plan, expected, result)
    ledger = mesh.context.stats.total
    ledger.clear()
    loss_of(sharded, 0).backward()
    result.collectives, result.sent = dict(ledger.count), dict(ledger.bytes)
    sharded.zero_grad()

    found = _train(sharded, steps, torch.nn.utils.clip_grad_norm_)
    result.norms, result.moved = found["norms"], expected["moved"]
    for step, (a, b) in enumerate(zip(expected["losses"], found["losses"], strict=True)):
        _note(result, "loss", abs(a - b) / abs(a), f"forward {step}")
    for step, (a, b) in enumerate(zip(expected["norms"], found["norms"], strict=True)):
        _note(result, "norm", abs(a - b) / a, f"step {step}")
    _compare_shares(sharded, plan, expected, found["grads"], result)

    if any(mesh.unit_cpu.gather_objects(bool(result.failures()))):
        return result  # replicas have drifted apart; saving and generating would be refused for that
    result.where["state"] = _fault_of_checkpoint(sharded, whole)
    result.state = not result.where["state"]
    if expected["tokens"] is not None:
        result.generation = _generated(sharded) == expected["tokens"]
    return result


def on_one_rank(mesh: Mesh, make: Callable[[], Any]) -> Any:
    """What ``make`` gives on the TP group's first rank, on every rank; an exception there is raised on all of them."""
    packed = io.BytesIO()
    error: str | None = None
    if mesh.tp.rank == 0:
        try:
            torch.save(make(), packed)
        except TPError as known:
            error = str(known)
        except Exception:
            error = traceback.format_exc()
    error, data = mesh.unit_cpu.broadcast_object((error, packed.getvalue()))
    if error is not None:
        raise TPError(error)
    return torch.load(io.BytesIO(data))


def _reference(whole: nn.Module, plan: Plan, steps: int) -> dict[str, Any]:
    """All that the sharded model is compared with; ``whole`` is trained on the way."""
    order: list[str] = []
    outputs = _outputs(whole, plan, order)
    start = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    seen = _train(whole, steps, _clip_whole)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    moved = max((weights[name] - start[name]).abs().max().item() for name in weights)
    tokens = _generated(whole) if whole.can_generate() and hasattr(whole, "generate") else None  # type: ignore[operator]
    return {**seen, "order": order, "outputs": outputs, "weights": weights, "moved": moved, "tokens": tokens}


def _generated(model: nn.Module) -> list[list[int]]:
    given: dict[str, Any] = {**prompt(model), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens: list[list[int]] = model.eval().generate(**given).tolist()  # type: ignore[operator]
    return tokens


def _compare_shares(
    sharded: nn.Module, plan: Plan, expected: dict[str, Any], grads: dict[str, torch.Tensor], result: Result
) -> None:
    """Gradients and weights of this rank against its shares of the whole model's; deviations are those of all ranks."""
    mesh = require().mesh
    rank = mesh.tp.rank
    apart: dict[str, tuple[float, float]] = {}
    for name, weight in expected["weights"].items():
        layout, grad = plan.layouts[name], expected["grads"].get(name)
        far = 0.0
        if grad is not None:
            share = layout.shard(grad, rank)
            far = ((grads[name] - share) if name in grads else share).norm().item()
        elif name in grads:
            far = float("inf")
        local = sharded.get_parameter(name).detach()
        apart[name] = far, (local - layout.shard(weight, rank)).abs().max().item() if local.numel() else 0.0
    everyone = mesh.unit_cpu.gather_objects(apart)
    size = torch.stack([grad.norm() for grad in expected["grads"].values()]).norm().item()
    wrong = []
    for name in expected["weights"]:
        layout, grad = plan.layouts[name], expected["grads"].get(name)
        _note(result, "weight", max(theirs[name][1] for theirs in everyone), name)
        far = [theirs[name][0] for theirs in everyone]
        if grad is None:
            if max(far):
                _note(result, "gradient", float("inf"), f"{name}, which has none in the whole model")
            continue
        # a gradient that is zero but for rounding noise (a key's bias: softmax ignores it) must stay noise
        scale = grad.norm().item() if grad.norm() > 1e-6 * size else 1e-2 * size
        deviation = (math.hypot(*far) if layout.is_sharded else max(far, key=_nan_is_worst)) / scale
        _note(result, "gradient", deviation, name)
        if not deviation <= LIMITS["gradient"]:
            wrong.append(name)
    if wrong and not result.hints.get("output"):
        order = expected["order"]
        last = {path: at for at, path in enumerate(order)}
        first = max(wrong, key=lambda name: last.get(name.rpartition(".")[0], -1))
        hint = hints.of_gradient(first, plan, order)
        result.hints["gradient"] = f"the backward goes wrong first at {first}" + (f": {hint}" if hint else "")


def _nan_is_worst(number: float) -> float:
    return float("inf") if math.isnan(number) else number


def _fault_of_checkpoint(sharded: nn.Module, whole: nn.Module) -> str:
    """What is wrong with the checkpoint that the main process writes, as plain transformers reloads it; or nothing."""
    mesh, record = require().mesh, sharded.tp_record
    fault = ""
    with record.runtime.sessions.together("proof"):  # type: ignore[union-attr,operator]
        if mesh.is_leader:
            saved, plain = sharded.state_dict(), whole.state_dict()
            remade = getattr(whole, "_keys_to_ignore_on_save", None) or ()  # sinusoids, which no checkpoint has
            with tempfile.TemporaryDirectory() as folder, _quiet():
                sharded.save_pretrained(folder, state_dict=dict(saved))  # type: ignore[operator]  # it is emptied
                reloaded = type(whole).from_pretrained(folder).state_dict()  # type: ignore[attr-defined]
            for state, what, left_out in ((saved, "state_dict", ()), (reloaded, "the reloaded checkpoint", remade)):
                if state.keys() != plain.keys():
                    fault = f"{what} has other keys: {sorted(state.keys() ^ plain.keys())}"
                else:
                    far = {key: (state[key].float() - plain[key].float()).abs() for key in plain if key not in left_out}
                    wrong = [key for key, apart in far.items() if apart.numel() and not apart.max() <= LIMITS["weight"]]
                    fault = f"{what} deviates in {', '.join(wrong)}" if wrong else ""
                if fault:
                    break
    return str(mesh.unit_cpu.broadcast_object(fault))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _outputs(model: nn.Module, plan: Plan, order: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Outputs of the modules that are whole on every rank, in the order in which they end.

    Args:
        order: takes the paths of all modules in the order in which they begin; then ``model`` is the whole one, and
            the policy is not to blame if it cannot run.
    """
    inside = tuple(f"{path}." for path in (*plan.blocks, *plan.embeddings))
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if order is not None:
            handles.append(module.register_forward_pre_hook(_noting(order, path)))
        hidden = path.startswith(inside) and path not in plan.blocks and path not in plan.rows
        if not hidden:
            handles.append(module.register_forward_hook(_recorder(outputs, path)))
    blamed = plan if order is None else None
    with torch.no_grad(), hints.explained(model, blamed, require().mesh.tp.rank):
        loss_of(model, 0)
    for handle in handles:
        handle.remove()
    return outputs


def _compare_outputs(sharded: nn.Module, plan: Plan, expected: dict[str, Any], result: Result) -> None:
    """Note the largest deviation, or the first that is beyond the limit."""
    rank = require().mesh.tp.rank
    found = _outputs(sharded, plan)
    for path, tensor in expected["outputs"].items():
        where = f"module {path or '(the model)'}"
        if path not in found or found[path].shape != tensor.shape:
            result.output, result.where["output"] = float("inf"), f"{where}: another shape"
            result.hints["output"] = hints.of_block(sharded, plan, path, rank)
            return
        apart = ((found[path] - tensor).norm() / tensor.norm().clamp_min(1e-12)).item()
        if not apart <= LIMITS["output"]:
            result.output, result.where["output"] = apart, where
            result.hints["output"] = hints.of_block(sharded, plan, path, rank)
            return
        result.output = max(result.output, apart)


def _noting(order: list[str], path: str) -> Any:
    def note(module: nn.Module, args: Any) -> None:
        order.append(path)

    return note


def _recorder(outputs: dict[str, torch.Tensor], path: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            # of all calls, in whatever order: some models ask their rotary embedding for each of a set of layer types
            before = outputs.get(path)
            again = before is not None and before.shape == first.shape
            outputs[path] = before + first.detach() if again else first.detach().clone()  # type: ignore[operator]

    return record


def _note(result: Result, kind: str, value: float, where: str) -> None:
    if kind not in result.where or not value <= getattr(result, kind):
        setattr(result, kind, value)
        result.where[kind] = where


def _clip_whole(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """As torch's own, which is the sharded models' matter once there are some: a call of all ranks."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()  # type: ignore[union-attr]
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _train(model: nn.Module, steps: int, clip: Callable[..., torch.Tensor]) -> dict[str, Any]:
    model.train()
    # eps above rounding noise, which AdamW would otherwise blow up to whole steps of any sign
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6)
    seen: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(steps):
        for micro in range(MICRO):
            loss = loss_of(model, 10 * step + micro) / MICRO
            loss.backward()
            seen["losses"].append(loss.item())
        if step == 0:
            seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen["norms"].append(clip(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen
