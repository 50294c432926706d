"""What scripts make of logits: losses and metrics, written as for plain torch. Each takes (2, 7, vocabulary)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.trainer_pt_utils import LabelSmoother

LEAD = (2, 7)


def labels(logits: torch.Tensor, ignored: bool = True) -> torch.Tensor:
    """Labels (2, 7), the first and the last entry of the vocabulary among them."""
    size = logits.shape[-1]
    found = torch.randint(0, size, logits.shape[:-1], generator=torch.Generator().manual_seed(1))
    found[0, 1], found[0, 2] = 0, size - 1
    if ignored:
        found[-1, 4:] = -100
    return found


def noise(logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(logits.shape, generator=generator).to(logits.dtype)


def causal(logits: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(logits, labels(logits), logits.shape[-1])


def of_a_batch(logits: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(logits, labels(logits), logits.shape[-1], num_items_in_batch=torch.tensor(23))


def masked(logits: torch.Tensor) -> torch.Tensor:
    return ForMaskedLMLoss(logits, labels(logits), logits.shape[-1])


def another_ignored(logits: torch.Tensor) -> torch.Tensor:
    target = labels(logits).clamp(min=0)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), target.view(-1), ignore_index=0)


def capped(logits: torch.Tensor) -> torch.Tensor:
    return causal(torch.tanh(logits / 3.0) * 3.0)


def scaled(logits: torch.Tensor) -> torch.Tensor:
    return causal(logits * 0.3) + masked(logits / 4.0)


def biased(logits: torch.Tensor) -> torch.Tensor:
    return masked(logits + torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)[None])


def shifted(logits: torch.Tensor) -> torch.Tensor:
    target = labels(logits)[..., 1:].contiguous()
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), target.view(-1))


def smoothed(logits: torch.Tensor) -> torch.Tensor:
    target = labels(logits)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target, label_smoothing=0.1)


def trainer_smoothed(logits: torch.Tensor) -> torch.Tensor:
    return LabelSmoother(0.1)({"logits": logits}, labels(logits), shift_labels=True)


def weighted(logits: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(0.5, 2, logits.size(-1), dtype=logits.dtype)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels(logits).flatten(), weight=weight)


def by_token(logits: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels(logits).flatten(), reduction="none")
    return (each * torch.arange(14.0)).sum()


def selected(logits: torch.Tensor) -> torch.Tensor:
    target = labels(logits)
    return F.cross_entropy(logits[target != -100], target[target != -100])


def nothing_to_learn(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), torch.full((14,), -100), reduction="sum")


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    found = logits.log_softmax(-1).gather(-1, labels(logits, ignored=False).unsqueeze(-1)).squeeze(-1)
    return (found * torch.arange(7.0)).sum()


def selective_log_softmax(logits: torch.Tensor) -> torch.Tensor:
    found = torch.gather(logits, dim=-1, index=labels(logits, ignored=False).unsqueeze(-1)).squeeze(-1)
    return (found - torch.stack([torch.logsumexp(each, dim=-1) for each in logits])).exp().mean()


def negative_log_likelihood(logits: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(logits, -1).view(-1, logits.size(-1)), labels(logits).flatten())


def normalized_by_hand(logits: torch.Tensor) -> torch.Tensor:
    """A number per token that has a gradient: subtracted, and as a temperature."""
    log = logits - logits.logsumexp(-1, keepdim=True)
    temperature = 1 + 0.1 * log.gather(-1, labels(logits, ignored=False).unsqueeze(-1)).exp()
    return causal(log / temperature) + causal(logits * temperature.squeeze(-1).unsqueeze(-1))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    log = F.log_softmax(logits, dim=-1)
    return -(log.exp() * log).sum(-1).mean()


def entropy_of_softmax(logits: torch.Tensor) -> torch.Tensor:
    return (torch.logsumexp(logits, -1) - (F.softmax(logits, dim=-1) * logits).sum(-1)).mean()


def distilled(logits: torch.Tensor) -> torch.Tensor:
    wanted = F.softmax(noise(logits) / 2, -1)
    return F.kl_div(F.log_softmax(logits / 2, -1), wanted, reduction="batchmean") * 4


def distilled_from_logarithms(logits: torch.Tensor) -> torch.Tensor:
    wanted = F.log_softmax(noise(logits), -1)
    return F.kl_div(F.log_softmax(logits, -1), wanted, reduction="sum", log_target=True) / 14


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    return causal(logits) + 1e-2 * (logits.float().logsumexp(-1) ** 2).mean()


def highest(logits: torch.Tensor) -> torch.Tensor:
    return logits.max(-1).values.sum() + logits.topk(2, -1).values[..., 1].sum()


def accuracy(logits: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == labels(logits)).float().mean()


def sorted_columns(logits: torch.Tensor) -> torch.Tensor:
    return (logits.sort(-1).values * torch.arange(float(logits.shape[-1]))).mean()


def transposed(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels(logits))


def transposed_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Classes in dimension 1, a cast after that, no reduction, as in examples/finetune.py."""
    tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), labels(logits)[:, 1:], reduction="none")
    log = logits.permute(0, 2, 1).log_softmax(1)
    entries = log.gather(1, labels(logits, ignored=False).unsqueeze(1)).squeeze(1)
    return tokens.mean(1).sum() + (entries * log.logsumexp(1).exp()).sum() + (log.exp() * log).sum(1).mean()


def class_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), noise(logits).softmax(-1).view(-1, logits.size(-1)))


def loss_and_columns(logits: torch.Tensor) -> torch.Tensor:
    return causal(logits) + logits.cumsum(-1).mean() + 0.1 * logits[..., 1].mean()


def written_into(logits: torch.Tensor) -> torch.Tensor:
    part = logits[:, :-1]
    part /= 2.0
    part[0, 0] = 1.0
    return logits.exp().mean() + part.pow(2).mean()


class Passed(torch.autograd.Function):
    """Hands its input on, as the hooks of ZeRO-3 and of DDP do."""

    @staticmethod
    def forward(ctx, x, how):
        return {"detached": x.detach, "copied": x.clone, "same": lambda: x}[how]()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def passed_on(logits: torch.Tensor) -> torch.Tensor:
    for how in ("detached", "copied", "same"):
        logits = Passed.apply(logits, how)
    return causal(logits) + 0.3 * masked(logits)


def gradient_of_logits(logits: torch.Tensor) -> torch.Tensor:
    """The loss, and the logits' gradient as a hook, as ``retain_grad`` and as ``autograd.grad`` show it."""
    seen: list[torch.Tensor] = []
    logits.retain_grad()
    logits.register_hook(seen.append)
    causal(logits).backward(retain_graph=True)
    (found,) = torch.autograd.grad(causal(logits), logits)
    return masked(logits) + (logits.grad**2).sum() + seen[0].abs().sum() + found.abs().max()


LOCAL: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    causal, of_a_batch, masked, another_ignored, capped, scaled, biased, shifted, smoothed, trainer_smoothed,
    by_token, selected, nothing_to_learn, log_probabilities, normalized_by_hand, selective_log_softmax,
    negative_log_likelihood, entropy, entropy_of_softmax, transposed, transposed_probabilities, distilled,
    distilled_from_logarithms, z_loss, highest, accuracy, passed_on,
)  # fmt: skip
"""For which ranks exchange some numbers per token and no columns."""

WHOLE = (weighted, sorted_columns, class_probabilities, loss_and_columns, written_into, gradient_of_logits)
"""For which the columns are gathered."""


def read_like_an_ordinary_tensor(logits: torch.Tensor, plain: torch.Tensor) -> None:
    """Everything else that scripts and libraries do with logits without gradients."""
    import copy
    import io
    import pickle

    import numpy as np

    def same(make: Callable[[torch.Tensor], object], close: bool = False) -> None:
        got, want = make(logits), make(plain)
        if isinstance(want, torch.Tensor):
            assert isinstance(got, torch.Tensor) and got.dtype == want.dtype and got.shape == want.shape
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6) if close else torch.equal(got, want)
        else:
            assert got == want

    def saved(x: torch.Tensor) -> torch.Tensor:
        file = io.BytesIO()
        torch.save({"x": x}, file)
        file.seek(0)
        return torch.load(file)["x"]

    shape = (lambda x: x.shape, lambda x: x.size(-1), lambda x: x.ndim, lambda x: x.numel(), len, lambda x: x.dtype)
    shape += (lambda x: x.is_contiguous(), lambda x: x[:, 1:].is_contiguous(), lambda x: x.stride(), torch.is_tensor)
    parts = (lambda x: x[0], lambda x: x[:, -1], lambda x: x[:, -1, :], lambda x: x[..., :4], lambda x: x[0, 0, 3])
    parts += (lambda x: x[[1, 0]], lambda x: x[torch.tensor([1, 1])], lambda x: x[None], lambda x: x[..., 2])
    parts += (lambda x: x[x[..., 0] > 0], lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 3])])
    views = (lambda x: x.unsqueeze(0)[0], lambda x: x.permute(1, 0, 2), lambda x: x.transpose(0, 2), lambda x: x.mT)
    views += (
        lambda x: x.permute(1, 0, 2).reshape(-1, x.size(-1)),
        lambda x: x.split(3, dim=1)[1],
        lambda x: x.view(-1),
    )
    views += (
        lambda x: x.chunk(2)[1],
        lambda x: torch.stack(list(x)),
        lambda x: torch.cat([x, x]),
        lambda x: x.flatten(),
    )
    copies = (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved, lambda x: x.detach().cpu(), repr)
    copies += (lambda x: x.tolist(), lambda x: x.numpy().tolist(), lambda x: np.asarray(x).tolist(), lambda x: x.data)
    kinds = (lambda x: x.double(), lambda x: x.half().float(), lambda x: x.to("cpu", torch.float64), lambda x: x.to(x))
    kinds += (lambda x: x.to(copy=True, dtype=torch.float32, device="cpu"), lambda x: x.type_as(x.double()))
    sums = (lambda x: 1 / x, lambda x: 2 - x, lambda x: x - x, lambda x: plain - x, lambda x: torch.ones(2, 7, 1) * x)
    sums += (lambda x: x > 0, lambda x: x == plain, lambda x: (x > 0).sum(), lambda x: torch.where(x > 0, x, -1.0))
    sums += (lambda x: x.masked_fill(x < 0, -1e4), torch.zeros_like, lambda x: x.new_zeros(2), lambda x: x.cumsum(-1))
    places = (lambda x: x.argmax(-1), lambda x: x.argmax(), lambda x: x.argmax(-1, keepdim=True), lambda x: x.max())
    places += (lambda x: x.topk(3).indices, lambda x: x.max(-1)[1], lambda x: x.argsort(-1), lambda x: x.isnan().any())
    places += (lambda x: x.isfinite().all(), lambda x: x.argmax(1))
    for make in (*shape, *parts, *views, *copies, *kinds, *sums, *places):
        same(make)
    close = (lambda x: x.softmax(-1), lambda x: torch.softmax(x, dim=2), lambda x: x.softmax(1), lambda x: x.mean())
    close += (lambda x: x.sum((-1,)), lambda x: x.std(-1), lambda x: x.sum(), lambda x: x.mean(-1, keepdim=True))
    for make in close:
        same(make, close=True)

    written = logits.clone()
    written[0] = 0
    rows = written.view(-1, written.size(-1))
    rows[-1] = 7
    assert (written[0] == 0).all() and (written[1, -1] == 7).all() and torch.equal(logits, plain)
    for wrong in (lambda x: x.view(3, -1), lambda x: x.view(5, x.size(-1)), lambda x: x[9]):
        errors = []
        for x in (logits, plain):
            try:
                wrong(x)
            except (RuntimeError, IndexError) as error:
                errors.append(str(error))
        assert len(errors) == 2 and errors[0] == errors[1], errors
