"""Numbers of gradients: norms, statistics, products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from habits.base import Model, gradient_habit, weights


@gradient_habit
def clipping_by_hand(model: Model) -> Any:
    norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in weights(model)))
    for p in weights(model):
        p.grad.mul_(0.5 / (norm + 1e-6))
    return norm


@gradient_habit
def clipping_per_parameter(model: Model) -> Any:
    norms = []
    for p in weights(model):
        norm = p.grad.data.norm(2)
        norms.append(norm)
        p.grad.data.mul_(torch.clamp(0.01 / (norm + 1e-6), max=1.0))
    return torch.stack(norms)


@gradient_habit
def norms_of_all_kinds(model: Model) -> Any:
    found = []
    for p in weights(model):
        for order in (1, 2, 3.0, float("inf"), 0):
            found.append(torch.linalg.vector_norm(p.grad, order))
        found += [p.grad.norm(), p.norm(p=1), torch.norm(p.detach()), p.grad.detach().float().norm().cpu()]
    return torch.stack([one.detach().float() for one in found])


@gradient_habit
def foreach_norms(model: Model) -> Any:
    grads = [p.grad for p in weights(model)]
    torch._foreach_mul_(grads, 0.5)
    return torch.stack(torch._foreach_norm(grads))


@gradient_habit
def statistics_of_gradients(model: Model) -> Any:
    found = []
    for p in weights(model):
        g = p.grad
        found += [g.sum(), g.mean(), g.abs().mean(), g.max(), g.min(), g.amax(), g.std(), g.var(), g.median()]
        found += [
            (g == 0).sum(),
            torch.isnan(g).any(),
            g.isfinite().all(),
            torch.count_nonzero(g),
            (g > 0).float().mean(),
        ]
    return torch.stack([one.float() for one in found])


@gradient_habit
def signal_to_noise(model: Model) -> Any:
    return torch.stack([p.grad.abs().mean() / (p.detach().abs().mean() + 1e-12) for p in weights(model)])


@gradient_habit
def histograms(model: Model) -> Any:
    return torch.stack([torch.histc(p.grad.float(), bins=8, min=-1e-3, max=1e-3) for p in weights(model)])


@gradient_habit
def flat_gradient(model: Model) -> Any:
    return torch.cat([p.grad.view(-1) for p in weights(model)])


@gradient_habit
def numpy_of_gradients(model: Model) -> Any:
    return torch.tensor([float((p.grad.cpu().numpy() ** 2).sum()) for p in weights(model)])


@gradient_habit
def cosine_of_gradient_and_weight(model: Model) -> Any:
    return torch.stack([F.cosine_similarity(p.grad.flatten(), p.detach().flatten(), dim=0) for p in weights(model)])


@gradient_habit
def products_of_gradient_and_weight(model: Model) -> Any:
    return torch.stack([(p.grad * p.detach()).sum() for p in weights(model)])


@gradient_habit
def shapes_of_gradients(model: Model) -> Any:
    assert all(p.grad.shape == p.shape and p.grad.numel() == p.numel() for p in weights(model))
    return torch.tensor([size for p in weights(model) for size in p.grad.shape])
