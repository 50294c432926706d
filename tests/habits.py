"""What scripts do to parameters and gradients after ``prepare``: each habit is a function of a model.

It returns numbers to be compared with those of the plain model, beside every parameter and gradient afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Model = Any
HABITS: dict[str, Callable[[Model], Any]] = {}


def habit(function: Callable[[Model], Any]) -> Callable[[Model], Any]:
    HABITS[function.__name__] = function
    return function


def weights(model: Model) -> list[Any]:
    return list(model.parameters())


def embedding(model: Model) -> Any:
    return model.get_input_embeddings().weight


def matrix(model: Model, part: str) -> Any:
    """The first 2-d parameter with ``part`` in its name."""
    return next(p for name, p in model.named_parameters() if part in name and p.dim() == 2)


# numbers of gradients


@habit
def clipping_by_hand(model: Model) -> Any:
    norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in weights(model)))
    for p in weights(model):
        p.grad.mul_(0.5 / (norm + 1e-6))
    return norm


@habit
def clipping_per_parameter(model: Model) -> Any:
    norms = []
    for p in weights(model):
        norm = p.grad.data.norm(2)
        norms.append(norm)
        p.grad.data.mul_(torch.clamp(0.01 / (norm + 1e-6), max=1.0))
    return torch.stack(norms)


@habit
def norms_of_all_kinds(model: Model) -> Any:
    found = []
    for p in weights(model):
        for order in (1, 2, 3.0, float("inf"), 0):
            found.append(torch.linalg.vector_norm(p.grad, order))
        found += [p.grad.norm(), p.norm(p=1), torch.norm(p.detach()), p.grad.detach().float().norm().cpu()]
    return torch.stack([one.detach().float() for one in found])


@habit
def foreach_norms(model: Model) -> Any:
    grads = [p.grad for p in weights(model)]
    torch._foreach_mul_(grads, 0.5)
    return torch.stack(torch._foreach_norm(grads))


@habit
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


@habit
def signal_to_noise(model: Model) -> Any:
    return torch.stack([p.grad.abs().mean() / (p.detach().abs().mean() + 1e-12) for p in weights(model)])


@habit
def histograms(model: Model) -> Any:
    return torch.stack([torch.histc(p.grad.float(), bins=8, min=-1e-3, max=1e-3) for p in weights(model)])


@habit
def flat_gradient(model: Model) -> Any:
    return torch.cat([p.grad.view(-1) for p in weights(model)])


@habit
def numpy_of_gradients(model: Model) -> Any:
    return torch.tensor([float((p.grad.cpu().numpy() ** 2).sum()) for p in weights(model)])


@habit
def cosine_of_gradient_and_weight(model: Model) -> Any:
    return torch.stack([F.cosine_similarity(p.grad.flatten(), p.detach().flatten(), dim=0) for p in weights(model)])


@habit
def products_of_gradient_and_weight(model: Model) -> Any:
    return torch.stack([(p.grad * p.detach()).sum() for p in weights(model)])


# gradients that the script changes


@habit
def gradient_centralisation(model: Model) -> None:
    for p in weights(model):
        if p.dim() > 1:
            p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))


@habit
def gradient_centralisation_new(model: Model) -> None:
    for p in weights(model):
        if p.dim() > 1:
            p.grad = p.grad - p.grad.mean(dim=-1, keepdim=True)


@habit
def gradient_noise(model: Model) -> None:
    torch.manual_seed(5)
    for p in weights(model):
        p.grad.add_(torch.randn_like(p.grad) * 0.01)


@habit
def gradient_noise_of_a_shape(model: Model) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in weights(model):
        p.grad += torch.randn(p.shape, generator=generator) * 0.01


@habit
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


@habit
def gradients_that_are_kept(model: Model) -> None:
    kept = [p.grad.clone() for p in weights(model)]
    for p in weights(model):
        p.grad = None
    for p, g in zip(weights(model), kept, strict=True):
        p.grad = g * 2


@habit
def gradients_not_finite(model: Model) -> Any:
    matrix(model, "layers.0" if hasattr(model, "model") else "h.0").grad[1, 2] = float("inf")
    bad = [not torch.isfinite(p.grad).all() for p in weights(model)]
    for p in weights(model):
        torch.nan_to_num_(p.grad, posinf=0.0)
    return torch.tensor(bad)


@habit
def gradient_of_rows(model: Model) -> Any:
    embedding(model).grad[:7] = 0
    embedding(model).grad[-3:].mul_(2)
    return embedding(model).grad[5:12].norm(dim=1)


@habit
def sign_descent(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad.sign(), alpha=-1e-3)


@habit
def normalised_descent(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            p -= 0.1 * p.grad / (p.grad.norm() + 1e-8)


@habit
def lars(model: Model) -> None:
    with torch.no_grad():
        for p in weights(model):
            ratio = p.norm() / (p.grad.norm() + 1e-2 * p.norm() + 1e-8)
            p.data.add_(p.grad.data + 1e-2 * p.data, alpha=-float(1e-2 * ratio))


@habit
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


@habit
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


@habit
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


@habit
def hook_that_scales(model: Model) -> Any:
    handles = [p.register_hook(lambda grad: grad / (grad.norm() + 1)) for p in weights(model)]
    model.zero_grad()
    loss = model(**model.batch).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss


@habit
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


@habit
def gradients_by_autograd_grad(model: Model) -> Any:
    grads = torch.autograd.grad(model(**model.batch).loss, weights(model))
    for p, g in zip(weights(model), grads, strict=True):
        p.grad = g
    return torch.stack([g.norm() for g in grads])


# penalties in the loss


def trained_with(model: Model, penalty: Callable[[], Any]) -> Any:
    model.zero_grad()
    loss = model(**model.batch).loss + penalty()
    loss.backward()
    return loss


@habit
def l1(model: Model) -> Any:
    return trained_with(model, lambda: 1e-3 * sum(p.abs().sum() for p in weights(model)))


@habit
def l2(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(p.pow(2).sum() for p in weights(model)))


@habit
def norms_as_penalty(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(torch.norm(p) for p in weights(model)))


@habit
def l2_to_start(model: Model) -> Any:
    start = [p.detach().clone() * 0.9 for p in weights(model)]
    return trained_with(model, lambda: sum(F.mse_loss(p, s) for p, s in zip(weights(model), start, strict=True)))


@habit
def ewc(model: Model) -> Any:
    fisher = [p.grad.detach().pow(2) for p in weights(model)]
    old = [p.detach() * 0.9 for p in weights(model)]

    def penalty() -> Any:
        return sum((f * (p - o) ** 2).sum() for f, p, o in zip(fisher, weights(model), old, strict=True))

    return trained_with(model, lambda: 100 * penalty())


@habit
def orthogonality(model: Model) -> Any:
    def penalty() -> Any:
        total = 0.0
        for p in weights(model):
            if p.dim() == 2:
                total = total + ((p @ p.T) - torch.eye(p.shape[0])).pow(2).mean()
        return total

    return trained_with(model, lambda: 1e-2 * penalty())


@habit
def centring(model: Model) -> Any:
    return trained_with(model, lambda: embedding(model).mean(0).pow(2).sum() + embedding(model).mean().pow(2))


@habit
def largest_weight(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * sum(p.abs().max() for p in weights(model)))


@habit
def nearest_tokens_as_penalty(model: Model) -> Any:
    def penalty() -> Any:
        rows = embedding(model)[torch.tensor([3, 40, 77])]
        return torch.cdist(rows, embedding(model)).mean() + F.normalize(embedding(model), dim=-1)[5].sum()

    return trained_with(model, penalty)


@habit
def group_lasso(model: Model) -> Any:
    return trained_with(model, lambda: 1e-3 * sum(p.norm(dim=1).sum() for p in weights(model) if p.dim() == 2))


@habit
def spectral(model: Model) -> Any:
    return trained_with(model, lambda: 1e-2 * torch.linalg.matrix_norm(matrix(model, "mlp"), 2))


# weights that the script reads


@habit
def shapes(model: Model) -> Any:
    found = []
    for p in weights(model):
        assert len(p) == p.shape[0] and p.size() == p.shape and p.size(0) == p.shape[0]
        assert p.dim() == len(p.shape) and p.nelement() == p.numel() == p.shape.numel() and p.grad.shape == p.shape
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
    return torch.tensor([len(text) for text in texts]), texts[0] == texts[0]


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


# weights that the script writes


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
def masks(model: Model) -> Any:
    mask = {p: (torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) > 0.3) for p in weights(model)}
    with torch.no_grad():
        for p in weights(model):
            p.masked_fill_(~mask[p], 0.0)
            p.grad *= mask[p]
    return torch.tensor([(p != 0).float().mean() for p in weights(model)])


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


@habit
def average_foreach(model: Model) -> None:
    ema = [p.detach().clone() for p in weights(model)]
    with torch.no_grad():
        torch._foreach_add_(weights(model), [p.grad for p in weights(model)], alpha=-0.1)
        torch._foreach_lerp_(ema, weights(model), 0.3)
        torch._foreach_copy_(weights(model), ema)


@habit
def average_of_a_copy(model: Model) -> Any:
    ema = copy.deepcopy(model)
    for p in ema.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad, alpha=-0.1)
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data.mul_(0.9).add_(p.data, alpha=0.1)
    return torch.stack([e.norm() for e in ema.parameters()]), ema(**model.batch).loss


@habit
def swa(model: Model) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p in weights(model):
            p.add_(p.grad, alpha=-0.1)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    return torch.stack([p.detach().norm() for p in averaged.parameters()])


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


@habit
def own_optimizer(model: Model) -> None:
    """A step of one that the script wrote, with momentum of its own."""
    momentum = {p: torch.zeros_like(p) for p in weights(model)}
    with torch.no_grad():
        for _ in range(3):
            for p in weights(model):
                momentum[p].mul_(0.9).add_(p.grad)
                p.sub_(momentum[p], alpha=0.01)


@habit
def lion(model: Model) -> None:
    state = {p: torch.zeros_like(p) for p in weights(model)}
    with torch.no_grad():
        for p in weights(model):
            update = state[p].clone().mul_(0.9).add(p.grad, alpha=0.1).sign_()
            p.add_(update, alpha=-1e-3)
            state[p].lerp_(p.grad, 0.01)
