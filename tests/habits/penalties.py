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


@gradient_habit
def norms_of_zero_weights(model: Model) -> Any:
    """As of LoRA's second matrices at the start: a norm has the gradient 0 at 0, not NaN."""
    with torch.no_grad():
        for number, p in enumerate(weights(model)):
            if number % 2:
                p.zero_()

    def penalty() -> Any:
        orders = (1, 2, 3.0)
        return 1e-2 * sum(torch.linalg.vector_norm(p, order) for p in weights(model) for order in orders)

    return trained_with(model, penalty)


class _WithPenalty(torch.nn.Module):
    """A module of the script's that stands in for the model."""

    def __init__(self, model: Model):
        super().__init__()
        self.called = [model]

    def forward(self, **inputs: Any) -> Any:
        (model,) = self.called
        before = embedding(model).norm()
        loss = model(**inputs).loss
        return loss + 1e-2 * before + (matrix(model, "mlp") @ matrix(model, "mlp").T).pow(2).mean()


@gradient_habit
def penalty_in_a_forward_around(model: Model) -> Any:
    model.zero_grad()
    loss = _WithPenalty(model)(**model.batch)
    loss.backward()
    return loss


@gradient_habit
def penalty_in_a_closure(model: Model) -> Any:
    """An optimizer calls the script's lines in the middle of its step."""
    losses = []

    def closure() -> Any:
        loss = trained_with(model, lambda: 1e-3 * sum(p.abs().sum() for p in weights(model)))
        losses.extend([loss.detach(), torch.stack([p.grad.norm() for p in weights(model)]).norm()])
        return loss

    torch.optim.SGD(weights(model), lr=1e-2).step(closure)
    return losses


@gradient_habit
def loss_by_hand_and_autograd_grad(model: Model) -> Any:
    """Deferred logits in the graph that torch.autograd.grad goes through."""
    logits = model(input_ids=model.batch["input_ids"]).logits
    labels = model.batch["input_ids"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    loss = loss - 0.1 * F.log_softmax(logits, -1).mean() + 1e-3 * embedding(model).norm()
    grads = torch.autograd.grad(loss, weights(model))
    for p, g in zip(weights(model), grads, strict=True):
        p.grad = g.clone()
    return torch.stack([g.norm() for g in grads])
