"""Gradients that a script changes, by hand or by hooks, and steps of its own."""

from __future__ import annotations

from typing import Any

import torch

from habits.base import Model, embedding, gradient_habit, matrix, weights


@gradient_habit
def gradient_centralisation(model: Model) -> None:
    for p in weights(model):
        if p.dim() > 1:
            p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))


@gradient_habit
def gradient_centralisation_new(model: Model) -> None:
    for p in weights(model):
        if p.dim() > 1:
            p.grad = p.grad - p.grad.mean(dim=-1, keepdim=True)


@gradient_habit
def gradient_noise(model: Model) -> None:
    torch.manual_seed(5)
    for p in weights(model):
        p.grad.add_(torch.randn_like(p.grad) * 0.01)


@gradient_habit
def gradient_noise_of_a_shape(model: Model) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in weights(model):
        p.grad += torch.randn(p.shape, generator=generator) * 0.01


@gradient_habit
def gradient_surgery(model: Model) -> Any:
    torch.manual_seed(3)
    flat = torch.cat([p.grad.flatten() for p in weights(model)])
    other = torch.randn(flat.shape)
    flat = flat - (flat @ other) / other.norm() ** 2 * other
    at = 0
    for p in weights(model):
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()
    return flat


@gradient_habit
def gradients_that_are_kept(model: Model) -> None:
    kept = [p.grad.clone() for p in weights(model)]
    for p in weights(model):
        p.grad = None
    for p, g in zip(weights(model), kept, strict=True):
        p.grad = g * 2


@gradient_habit
def gradients_not_finite(model: Model) -> Any:
    matrix(model, "layers.0" if hasattr(model, "model") else "h.0").grad[1, 2] = float("inf")
    bad = [not torch.isfinite(p.grad).all() for p in weights(model)]
    for p in weights(model):
        torch.nan_to_num_(p.grad, posinf=0.0)
    return torch.tensor(bad)


@gradient_habit
def gradient_of_rows(model: Model) -> Any:
    embedding(model).grad[:7] = 0
    embedding(model).grad[-3:].mul_(2)
    return embedding(model).grad[5:12].norm(dim=1)


@gradient_habit
def sign_descent(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad.sign(), alpha=-1e-3)


@gradient_habit
def normalised_descent(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            p -= 0.1 * p.grad / (p.grad.norm() + 1e-8)


@gradient_habit
def lars(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            ratio = p.norm() / (p.grad.norm() + 1e-2 * p.norm() + 1e-8)
            p.data.add_(p.grad.data + 1e-2 * p.data, alpha=-float(1e-2 * ratio))


@gradient_habit
def sam(model: Model) -> Any:
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in weights(model)]), p=2)
    backup = {}
    with torch.no_grad():
        for p in weights(model):
            backup[p] = p.data.clone()
            p.add_(p.grad * (0.05 / (norm + 1e-12)))
    model.zero_grad()
    loss = model(**model.batch).loss
    loss.backward()
    for p in weights(model):
        p.data = backup[p]
    return loss


@gradient_habit
def fgm(model: Model) -> Any:
    backup = {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and ("embed" in name or "wte" in name):
            backup[name] = p.data.clone()
            norm = torch.norm(p.grad)
            if norm != 0 and not torch.isnan(norm):
                p.data.add_(0.1 * p.grad / norm)
    loss = model(**model.batch).loss
    loss.backward()
    for name, p in model.named_parameters():
        if name in backup:
            p.data = backup[name]
    return loss


@gradient_habit
def hook_that_zeroes_a_neuron(model: Model) -> Any:
    weight = matrix(model, "mlp")

    def zero(grad: Any) -> Any:
        grad = grad.clone()
        grad[3] = 0
        return grad

    handle = weight.register_hook(zero)
    model.zero_grad()
    loss = model(**model.batch).loss
    loss.backward()
    handle.remove()
    return loss


@gradient_habit
def hook_that_scales(model: Model) -> Any:
    handles = [p.register_hook(lambda grad: grad / (grad.norm() + 1)) for p in weights(model)]
    model.zero_grad()
    loss = model(**model.batch).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss


@gradient_habit
def hook_after_accumulation(model: Model) -> Any:
    seen = {}

    def look(p: Any) -> None:
        seen[p] = p.grad.norm()
        p.grad.mul_(0.5)

    handles = [p.register_post_accumulate_grad_hook(look) for p in weights(model)]
    model.zero_grad()
    model(**model.batch).loss.backward()
    for handle in handles:
        handle.remove()
    return torch.stack([seen[p] for p in weights(model)])


@gradient_habit
def gradients_by_autograd_grad(model: Model) -> Any:
    grads = torch.autograd.grad(model(**model.batch).loss, weights(model))
    for p, g in zip(weights(model), grads, strict=True):
        p.grad = g
    return torch.stack([g.norm() for g in grads])
