"""The proof of a policy: the sharded model trained beside the whole one, on local gloo ranks.

Every rank holds both models and compares: outputs of all modules that are whole on every rank, losses, every gradient,
the gradient norm, weights after clipped AdamW steps, greedy generation, the saved state.
"""

from __future__ import annotations

import copy
import datetime
import os
import queue
import socket
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from tp_plugin.cli.target import build, find_policy
from tp_plugin.errors import TPError
from tp_plugin.policy import Policy

TIMEOUT = 120
STEPS, MICRO = 3, 2
LIMITS = {"output": 1e-4, "loss": 1e-5, "gradient": 1e-4, "norm": 1e-5, "weight": 3e-4}
"""Largest deviations in fp32: relative, except of weights (absolute, after the steps)."""


@dataclass
class Result:
    """Deviations of one rank; ``where`` names the module or parameter of each.

    ``collectives`` are those of one forward and backward by operation and group, ``moved`` is how far training took the
    weights (a model that does not move proves nothing).
    """

    output: float = 0.0
    loss: float = 0.0
    gradient: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    where: dict[str, str] = field(default_factory=dict)
    generation: bool | None = None
    state: bool | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    moved: float = 0.0

    def failures(self) -> list[str]:
        """What is beyond its limit, each with the place."""
        found = [
            f"{kind} deviates by {getattr(self, kind):.1e} (limit {limit:.0e}) at {self.where.get(kind, '?')}"
            for kind, limit in LIMITS.items()
            if not getattr(self, kind) <= limit
        ]
        if self.generation is False:
            found.append("greedy generation gives other tokens")
        if self.state is False:
            found.append("the saved state differs from the whole model's")
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
        results.put((rank, compare(config, find_policy(config, reference), tp)))
        torch.distributed.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def compare(config: Any, policy: Policy, tp: int, steps: int = STEPS) -> Result:
    """Run on every rank of an initialised world of ``tp``: the sharded model beside the whole one."""
    import tp_plugin
    from tp_plugin.parallel.mesh import ledger, require_mesh

    whole = build(config, meta=False)
    sharded = copy.deepcopy(whole)
    tp_plugin.parallelize(sharded, tp_size=tp, policy=policy)
    mesh, plan = require_mesh(), sharded.tp_record.plan  # type: ignore[union-attr]
    result = Result()

    def gathered(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return plan.layouts[name].gather(mesh.control.gather_objects(tensor))  # type: ignore[no-any-return]

    _compare_outputs(whole, sharded, plan, config.vocab_size, result)
    for counter in ledger.values():
        counter.clear()
    loss_of(sharded, config.vocab_size, 0).backward()
    result.collectives = dict(ledger["count"])
    sharded.zero_grad()

    start = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    expected, found = (_train(model, config.vocab_size, steps) for model in (whole, sharded))
    result.norms = found["norms"]
    for step, (a, b) in enumerate(zip(expected["losses"], found["losses"], strict=True)):
        _note(result, "loss", abs(a - b) / abs(a), f"forward {step}")
    for step, (a, b) in enumerate(zip(expected["norms"], found["norms"], strict=True)):
        _note(result, "norm", abs(a - b) / a, f"step {step}")
    size = torch.stack([grad.norm() for grad in expected["grads"].values()]).norm()
    for name, grad in expected["grads"].items():
        # a gradient that is zero but for rounding noise (a key's bias: softmax ignores it) must stay noise
        scale = grad.norm() if grad.norm() > 1e-6 * size else 1e-2 * size
        apart = gathered(name, found["grads"][name]) - grad if name in found["grads"] else grad
        _note(result, "gradient", (apart.norm() / scale).item(), name)
    for name in found["grads"].keys() - expected["grads"].keys():
        _note(result, "gradient", float("inf"), f"{name}, which has none in the whole model")
    for name, parameter in whole.named_parameters():
        local = sharded.get_parameter(name).detach()
        _note(result, "weight", (gathered(name, local) - parameter.detach()).abs().max().item(), name)
        result.moved = max(result.moved, (parameter.detach() - start[name]).abs().max().item())

    if any(mesh.control.gather_objects(bool(result.failures()))):
        return result  # replicas have drifted apart; saving and generating would be refused for that
    state, plain = sharded.state_dict(), whole.state_dict()
    apart = [(state[key].float() - plain[key].float()).abs().max().item() for key in plain if key in state]
    result.state = list(state) == list(plain) and max(apart, default=0.0) <= LIMITS["weight"]
    if whole.can_generate() and hasattr(whole, "generate"):  # type: ignore[operator]
        prompt = _batch(config.vocab_size, 99)["input_ids"][:, :4]
        limits = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        both = [model.eval().generate(prompt, **limits).tolist() for model in (whole, sharded)]  # type: ignore[operator]
        result.generation = both[0] == both[1]
    return result


def _compare_outputs(whole: nn.Module, sharded: nn.Module, plan: Any, vocabulary: int, result: Result) -> None:
    """Outputs of modules that are whole on every rank, in the order in which they run; the first that deviates."""
    seen: list[dict[str, torch.Tensor]] = []
    inside = tuple(f"{path}." for path in plan.blocks)
    for model in (whole, sharded):
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        for path, module in model.named_modules():
            hidden = path.startswith(inside) and path not in plan.blocks and path not in plan.rows
            if not hidden:
                handles.append(module.register_forward_hook(_recorder(outputs, path)))
        with torch.no_grad():
            loss_of(model, vocabulary, 0)
        for handle in handles:
            handle.remove()
        seen.append(outputs)
    expected, found = seen
    for path, tensor in expected.items():
        if path not in found or found[path].shape != tensor.shape:
            result.output, result.where["output"] = float("inf"), f"module {path or '(the model)'}: another shape"
            return
        apart = ((found[path] - tensor).norm() / tensor.norm().clamp_min(1e-12)).item()
        if not apart <= LIMITS["output"]:
            result.output, result.where["output"] = apart, f"module {path or '(the model)'}"
            return
        result.output = max(result.output, apart)


def _recorder(outputs: dict[str, torch.Tensor], path: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            outputs[path] = first.detach().clone()

    return record


def _note(result: Result, kind: str, value: float, where: str) -> None:
    if kind not in result.where or not value <= getattr(result, kind):
        setattr(result, kind, value)
        result.where[kind] = where


def _train(model: nn.Module, vocabulary: int, steps: int) -> dict[str, Any]:
    model.train()
    # eps above rounding noise, which AdamW would otherwise blow up to whole steps of any sign
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6)
    seen: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(steps):
        for micro in range(MICRO):
            loss = loss_of(model, vocabulary, 10 * step + micro) / MICRO
            loss.backward()
            seen["losses"].append(loss.item())
        if step == 0:
            seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def loss_of(model: nn.Module, vocabulary: int, seed: int) -> torch.Tensor:
    """The model's own loss, or the mean square of its output where it has none."""
    data = _batch(vocabulary, seed)
    labels = data.pop("labels")
    try:
        output = model(**data, labels=labels)
    except TypeError:
        output = model(**data)
    loss = getattr(output, "loss", None)
    return output[0].pow(2).mean() if loss is None else loss  # type: ignore[no-any-return]


def _batch(vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
