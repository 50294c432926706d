"""Penalties on weights in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from habits.base import Model, embedding, gradient_habit, matrix, weights


def trained_with(model: Model, penalty: Callable[[], Any]) -> Any:
    model.zero_grad()
    loss = model(**model.batch).loss + penalty()
    loss.backward()
    return loss


@gradient_habit
def l1(model: Model) -> Any:
    return trained_with(model, lambda: 1e-3 * sum(p.abs().sum() for p in weights(model)))


@gradient_habit
def l2(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(p.pow(2).sum() for p in weights(model)))


@gradient_habit
def norms_as_penalty(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(torch.norm(p) for p in weights(model)))


@gradient_habit
def l2_to_start(model: Model) -> Any:
    start = [p.detach().clone() * 0.9 for p in weights(model)]
    return trained_with(model, lambda: sum(F.mse_loss(p, s) for p, s in zip(weights(model), start, strict=True)))


@gradient_habit
def ewc(model: Model) -> Any:
    fisher = [p.grad.detach().pow(2) for p in weights(model)]
    old = [p.detach() * 0.9 for p in weights(model)]

    def penalty() -> Any:
        return sum((f * (p - o) ** 2).sum() for f, p, o in zip(fisher, weights(model), old, strict=True))

    return trained_with(model, lambda: 100 * penalty())


@gradient_habit
def orthogonality(model: Model) -> Any:
    def penalty() -> Any:
        total = 0.0
        for p in weights(model):
            if p.dim() == 2:
                total = total + ((p @ p.T) - torch.eye(p.shape[0])).pow(2).mean()
        return total

    return trained_with(model, lambda: 1e-2 * penalty())


@gradient_habit
def centring(model: Model) -> Any:
    return trained_with(model, lambda: embedding(model).mean(0).pow(2).sum() + embedding(model).mean().pow(2))


@gradient_habit
def largest_weight(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(p.abs().max() for p in weights(model)))


@gradient_habit
def nearest_tokens_as_penalty(model: Model) -> Any:
    def penalty() -> Any:
        rows = embedding(model)[torch.tensor([3, 40, 77])]
        return torch.cdist(rows, embedding(model)).mean() + F.normalize(embedding(model), dim=-1)[5].sum()

    return trained_with(model, penalty)


@gradient_habit
def group_lasso(model: Model) -> Any:
    return trained_with(model, lambda: 1e-3 * sum(p.norm(dim=1).sum() for p in weights(model) if p.dim() == 2))


@gradient_habit
def spectral(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * torch.linalg.matrix_norm(matrix(model, "mlp"), 2))
