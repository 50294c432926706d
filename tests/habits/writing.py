"""Weights that a script writes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from habits.base import Model, embedding, habit, matrix, weights


@habit
def rows(model: Model) -> None:
    with torch.no_grad():
        embedding(model)[3] = 0
        embedding(model)[-9:] = embedding(model)[:-9].mean(0)
        embedding(model)[[5, 88]] = torch.ones(2, embedding(model).shape[1])
        embedding(model)[7, 2] += 0.5
        embedding(model)[:, 4] *= 2
        embedding(model)[9].fill_(0.25)
        embedding(model)[11:13, 1].zero_()


@habit
def rows_of_data(model: Model) -> None:
    embedding(model).data[3] = 0
    embedding(model).data[-1].copy_(embedding(model).data[:-1].mean(dim=0))
    weight = matrix(model, "mlp").data
    weight[weight.abs() < 0.01] = 0
    weight[:, :3] = 1


@habit
def kept_views(model: Model) -> Any:
    row, flat, turned = embedding(model).data[5], embedding(model).data.view(-1), embedding(model).data.T
    row.zero_()
    flat[3] = 7.0
    turned[1, 2] = -1.0
    with torch.no_grad():
        embedding(model).add_(1)
    return row, flat[:8], turned[:3, 5]


@habit
def new_tokens(model: Model) -> None:
    weight = embedding(model)
    with torch.no_grad():
        weight[-4:] = torch.stack([weight[[1, 2, 3]].mean(0), weight[4], weight[90], weight[60] * 2])


@habit
def initialising(model: Model) -> None:
    torch.manual_seed(11)
    for p in weights(model):
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
        else:
            nn.init.normal_(p, std=0.1)


@habit
def initialising_in_place(model: Model) -> None:
    torch.manual_seed(12)
    for number, p in enumerate(weights(model)):
        if number % 3 == 0:
            p.data.normal_(0, 0.02)
        elif number % 3 == 1:
            p.data.uniform_(-0.1, 0.1)
        elif p.dim() > 1:
            nn.init.trunc_normal_(p, std=0.02)
            nn.init.kaiming_uniform_(p, a=5**0.5)
        else:
            p.data.zero_()


@habit
def orthogonal_start(model: Model) -> None:
    torch.manual_seed(13)
    nn.init.orthogonal_(matrix(model, "mlp"))


@habit
def decay_and_clamping(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            p.mul_(0.99).clamp_(-0.05, 0.05)


@habit
def weight_noise(model: Model) -> None:
    torch.manual_seed(14)
    with torch.no_grad():
        for p in weights(model):
            p.add_(torch.randn_like(p), alpha=1e-2)
            p += torch.randn(p.size()) * p.std()


@habit
def magnitude_pruning(model: Model) -> None:
    threshold = torch.cat([p.detach().abs().flatten() for p in weights(model)]).kthvalue(500).values
    with torch.no_grad():
        for p in weights(model):
            p.mul_((p.abs() > threshold).to(p.dtype))


@habit
def unit_rows(model: Model) -> None:
    with torch.no_grad():
        embedding(model).div_(embedding(model).norm(dim=-1, keepdim=True))
        matrix(model, "mlp").copy_(F.normalize(matrix(model, "mlp"), dim=1))


@habit
def whole_data(model: Model) -> None:
    for number, p in enumerate(weights(model)):
        p.data = torch.linspace(-1, 1, p.numel()).view(p.shape) * (1 + number)


@habit
def swapped(model: Model) -> None:
    alike = [p for p in weights(model) if p.shape == weights(model)[-2].shape]
    a, b = alike[0], alike[-1]
    a.data, b.data = b.data, a.data


@habit
def backup_and_restore(model: Model) -> Any:
    backup = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    for p in weights(model):
        p.data.zero_()
    for name, p in model.named_parameters():
        p.data.copy_(backup[name])
    return torch.stack([one.norm() for one in backup.values()])


@habit
def state_dict_loaded_by_hand(model: Model) -> None:
    state = {name: value.clone() * 0.5 for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(state[name])


@habit
def another_dtype_and_back(model: Model) -> Any:
    model.to(torch.float64)
    norms = torch.stack([p.detach().norm() for p in weights(model)])
    model.to(torch.float32)
    return norms
