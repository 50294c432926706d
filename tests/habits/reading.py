"""Weights that a script reads."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from habits.base import Model, embedding, habit, matrix, weights


@habit
def shapes(model: Model) -> Any:
    found = []
    for p in weights(model):
        assert len(p) == p.shape[0] and p.size() == p.shape and p.size(0) == p.shape[0]
        assert p.dim() == len(p.shape) and p.nelement() == p.numel() == p.shape.numel()
        found += [p.numel(), p.nbytes, p.data.shape[-1], p.stride(0), p.is_leaf, p.requires_grad]
    return torch.tensor(found)


@habit
def parameters_as_vector(model: Model) -> Any:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@habit
def vector_into_parameters(model: Model) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.5 + 0.01, model.parameters())


@habit
def nearest_token(model: Model) -> Any:
    hidden = model(**model.batch, output_hidden_states=True).hidden_states[-1]
    scores = hidden @ embedding(model).T
    return scores.topk(3).indices, torch.cdist(hidden[0], embedding(model)).argmin(-1), scores.detach()


@habit
def embedding_arithmetic(model: Model) -> Any:
    weight = embedding(model).detach()
    queen = weight[5] - weight[60] + weight[90]
    similarity = F.cosine_similarity(queen.unsqueeze(0), weight)
    return similarity, similarity.topk(5).indices, weight[[1, 2, 95]], weight[3, 4], weight[10:20, 2]


@habit
def printing(model: Model) -> Any:
    texts = [repr(p.detach()) for p in weights(model)] + [str(embedding(model)), f"{embedding(model)[0, 0]:.4f}"]
    return torch.tensor([float(zlib.crc32(text.encode())) for text in texts], dtype=torch.float64)


@habit
def lists_and_items(model: Model) -> Any:
    return torch.tensor(embedding(model).tolist()), embedding(model)[7, 3].item(), embedding(model).sum().item()


@habit
def quantiles_and_sorting(model: Model) -> Any:
    weight = matrix(model, "mlp").detach()
    values, order = weight.flatten().sort()
    return values, order[:5], weight.quantile(0.9), weight.kthvalue(2, dim=1).values, weight.argmax()


@habit
def svd(model: Model) -> Any:
    return torch.stack([torch.linalg.svdvals(p.detach())[:3] for p in weights(model) if p.dim() == 2])


@habit
def unbinding(model: Model) -> Any:
    rows = list(embedding(model).detach())
    first, second = embedding(model).detach().chunk(2)
    return torch.stack(rows[-2:]), first.sum(), second.sum(), len(rows)


@habit
def comparing(model: Model) -> Any:
    other = [p.detach().clone() for p in weights(model)]
    same = [torch.equal(p, o) and torch.allclose(p, o + 1e-12) for p, o in zip(weights(model), other, strict=True)]
    other[0][2, 1] += 1
    return torch.tensor([*same, torch.equal(weights(model)[0], other[0])])


@habit
def functional_linear(model: Model) -> Any:
    x = torch.linspace(-1, 1, matrix(model, "mlp").shape[1]).expand(2, -1)
    return F.linear(x, matrix(model, "mlp")).detach()


@habit
def a_layer_by_itself(model: Model) -> Any:
    found = [model.get_output_embeddings()(torch.ones(2, embedding(model).shape[1])).detach()]
    for name, module in model.named_modules():
        if "mlp" in name and type(module) is nn.Linear:
            found.append(module(torch.ones(2, module.weight.shape[1])).detach())
    return found


@habit
def an_embedding_by_itself(model: Model) -> Any:
    return model.get_input_embeddings()(torch.tensor([[1, 50, 96]])).detach()


@habit
def places(model: Model) -> Any:
    """Which elements, not which of this rank's."""
    weight = matrix(model, "mlp").detach()
    rows, columns = torch.where(weight > weight.mean())
    return (
        rows.sum(),
        columns.sum(),
        len(rows),
        (weight > 0).nonzero()[-3:],
        torch.masked_select(weight, weight > 0).sum(),
    )


@habit
def max_and_places(model: Model) -> Any:
    found = embedding(model).detach().max(dim=0)
    return found.values, found.indices, embedding(model).detach().abs().topk(2, dim=1).indices[-1]
