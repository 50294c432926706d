"""What the proof records of one model, whole or sharded: outputs, losses, gradients, norms, generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tp_plugin.cli.policy_hints import explain_failures
from tp_plugin.cli.random_batch import loss_of, prompt
from tp_plugin.policy import Plan
from tp_plugin.runtime.runtime import require

MICRO, CLIP = 2, 0.5
"""Micro-batches of a step, and the gradient norm to which it is clipped (which is less than any that occurs)."""


def train(model: nn.Module, steps: int, clip: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Train for ``steps`` steps of AdamW; ``losses`` by micro-batch, ``norms`` by step, ``grads`` of the first step.

    Args:
        clip: ``torch.nn.utils.clip_grad_norm_`` or :func:`clip_whole`.
    """
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


def clip_whole(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Clip the whole model on one rank alone; torch's own is a call of all ranks once there are sharded models."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()  # type: ignore[union-attr]
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def outputs(
    model: nn.Module, plan: Plan, order: list[str] | None = None, *, stages: int = 1
) -> dict[str, torch.Tensor]:
    """Outputs of the modules that are whole on every rank, by path, in the order in which they end.

    Args:
        order: takes the paths of all modules in the order in which they begin; then ``model`` is the whole one, and
            the policy is not to blame if it cannot run.
        stages: of the sharded model; with more than one, only what the model itself returns is whole on every rank.
    """
    inside = tuple(f"{path}." for path in (*plan.blocks, *plan.embeddings))
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if order is not None:
            handles.append(module.register_forward_pre_hook(_noting(order, path)))
        hidden = path.startswith(inside) and path not in plan.blocks and path not in plan.rows
        if not hidden and stages == 1:
            handles.append(module.register_forward_hook(_recorder(seen, path)))
    if stages > 1:
        handles.append(model.register_forward_hook(_returned(seen)))
    blamed = plan if order is None else None
    with torch.no_grad(), explain_failures(model, blamed, require().mesh.tp.rank):
        loss_of(model, 0)
    for handle in handles:
        handle.remove()
    return seen


def generated(model: nn.Module) -> list[list[int]]:
    """Six tokens, greedily."""
    given: dict[str, Any] = {**prompt(model), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens: list[list[int]] = model.eval().generate(**given).tolist()  # type: ignore[operator]
    return tokens


def _noting(order: list[str], path: str) -> Any:
    def note(module: nn.Module, args: Any) -> None:
        order.append(path)

    return note


def _returned(seen: dict[str, torch.Tensor]) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        first = next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim())
        seen[""] = first.detach() + 0

    return record


def _recorder(seen: dict[str, torch.Tensor], path: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            # of all calls, in whatever order: some models ask their rotary embedding for each of a set of layer types
            before = seen.get(path)
            again = before is not None and before.shape == first.shape
            seen[path] = before + first.detach() if again else first.detach().clone()  # type: ignore[operator]

    return record
