"""Averages, masks and optimizers of a script's own, which read gradients and write weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from habits.base import Model, bare, gradient_habit, habit, weights


@gradient_habit
def masks(model: Model) -> Any:
    mask = {p: (torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) > 0.3) for p in weights(model)}
    with torch.no_grad():
        for p in weights(model):
            p.masked_fill_(~mask[p], 0.0)
            p.grad *= mask[p]
    return torch.tensor([(p != 0).float().mean() for p in weights(model)])


@gradient_habit
def average(model: Model) -> Any:
    ema = [p.detach().clone() for p in weights(model)]
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad, alpha=-0.1)
        for e, p in zip(ema, weights(model), strict=True):
            e.mul_(0.9).add_(p, alpha=0.1)
        for e, p in zip(ema, weights(model), strict=True):
            p.copy_(e)
    return torch.stack([e.norm() for e in ema])


@gradient_habit
def average_foreach(model: Model) -> None:
    ema = [p.detach().clone() for p in weights(model)]
    with torch.no_grad():
        torch._foreach_add_(weights(model), [p.grad for p in weights(model)], alpha=-0.1)
        torch._foreach_lerp_(ema, weights(model), 0.3)
        torch._foreach_copy_(weights(model), ema)


@gradient_habit
def average_of_a_copy(model: Model) -> Any:
    ema = copy.deepcopy(bare(model))
    for p in ema.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad, alpha=-0.1)
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data.mul_(0.9).add_(p.data, alpha=0.1)
    return torch.stack([e.norm() for e in ema.parameters()]), ema(**model.batch).loss


@habit
def soft_updates_of_another_model(model: Model) -> Any:
    """Of one that was never prepared, by assignments to ``.data``."""
    targets = [torch.nn.Parameter(torch.full(p.shape, 0.5)) for p in weights(model)]
    copies = [torch.nn.Parameter(torch.empty(0)) for p in weights(model)]
    for target, copied, p in zip(targets, copies, model.parameters(), strict=True):
        target.data = 0.1 * p.data + 0.9 * target.data
        copied.data = p.data.clone()
    return [torch.stack([t.norm(), c.norm(), c.mean()]).detach() for t, c in zip(targets, copies, strict=True)]


@gradient_habit
def swa(model: Model) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(bare(model))
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad, alpha=-0.1)
    averaged.update_parameters(bare(model))
    averaged.update_parameters(bare(model))
    return torch.stack([p.detach().norm() for p in averaged.parameters()])


@gradient_habit
def own_optimizer(model: Model) -> None:
    """A step of one that the script wrote, with momentum of its own."""
    momentum = {p: torch.zeros_like(p) for p in weights(model)}
    with torch.no_grad():
        for _ in range(3):
            for p in weights(model):
                momentum[p].mul_(0.9).add_(p.grad)
                p.sub_(momentum[p], alpha=0.01)


@gradient_habit
def lion(model: Model) -> None:
    state = {p: torch.zeros_like(p) for p in weights(model)}
    with torch.no_grad():
        for p in weights(model):
            update = state[p].clone().mul_(0.9).add(p.grad, alpha=0.1).sign_()
            p.add_(update, alpha=-1e-3)
            state[p].lerp_(p.grad, 0.01)


@gradient_habit
def moments_of_an_optimizer(model: Model) -> Any:
    """Norms of moments for a log, a moment that is reset by rows, and one that is scaled."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    found = []
    with torch.no_grad():
        for p in weights(model):
            state = optimizer.state[p]
            found += [state["exp_avg"].norm(), state["exp_avg_sq"].mean()]
            assert state["exp_avg"].shape == p.shape
            state["exp_avg"][0] = 0
            state["exp_avg_sq"].mul_(2)
    optimizer.step()
    found += [state["exp_avg"].abs().max() for state in optimizer.state.values()]
    return torch.stack(found)


@gradient_habit
def optimizer_of_its_own_resumed(model: Model) -> Any:
    """An optimizer that is given to nobody: its state is saved whole, and loaded into another."""
    first = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    found = [saved["state"][at]["exp_avg"].norm() for at in sorted(saved["state"])]
    second = torch.optim.AdamW(model.parameters(), lr=1e-2)
    second.load_state_dict(saved)
    second.step()
    return torch.stack(found)
