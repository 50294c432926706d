"""The yardstick: a Llama sharded by hand as in Megatron-LM (Shoeybi et al. 2019), with nothing around it.

Heads and widths are divided over the ranks, the embedding and the head by vocabulary rows. Per layer and direction two
all-reduces; the loss is computed from local logits. No hooks, no guard, no generality: what a specialist would write.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Enter(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class Reduce(torch.autograd.Function):
    """The sum over the ranks; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Loss(torch.autograd.Function):
    """Mean cross-entropy of local logits (tokens, rows of this rank)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int) -> torch.Tensor:
        highest = logits.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        exponentials = (logits - highest[:, None]).exp_()
        inside = (labels >= first) & (labels < first + logits.shape[1])
        at = (labels - first).clamp(0, logits.shape[1] - 1)
        entry = logits.gather(1, at[:, None]).squeeze(1).masked_fill(~inside, 0)
        sums = torch.stack([exponentials.sum(-1), entry])
        dist.all_reduce(sums)
        used = labels >= 0
        ctx.save_for_backward(exponentials.div_(sums[0, :, None]), at, inside, used)
        each = sums[0].log() + highest - sums[1]
        return each.masked_fill(~used, 0).sum() / used.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        found, at, inside, used = ctx.saved_tensors
        found.scatter_add_(1, at[:, None], -inside.to(found.dtype)[:, None])
        return found.mul_((grad * used / used.sum())[:, None]), None, None


class Norm(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Layer(nn.Module):
    def __init__(self, config: Any, size: int):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size // size
        self.width, self.dim = hidden // size, config.head_dim
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.q, self.k, self.v = (nn.Linear(hidden, self.width, bias=False) for _ in range(3))
        self.o = nn.Linear(self.width, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = Enter.apply(self.norm1(x))
        q, k, v = (linear(y).unflatten(-1, (-1, self.dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (each * cos + _rotated(each) * sin for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + Reduce.apply(self.o(y))
        y = Enter.apply(self.norm2(x))
        return x + Reduce.apply(self.down(F.silu(self.gate(y)) * self.up(y)))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


class Reference(nn.Module):
    """``config``: a Llama's, with as many key-value heads as heads."""

    def __init__(self, config: Any):
        super().__init__()
        size, rank = dist.get_world_size(), dist.get_rank()
        self.rows = config.vocab_size // size
        self.first = rank * self.rows
        self.embedding = nn.Embedding(self.rows, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, size) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        self.head = nn.Linear(config.hidden_size, self.rows, bias=False)
        steps = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.register_buffer("frequencies", 1.0 / config.rope_parameters["rope_theta"] ** steps, persistent=False)

    def load(self, whole: dict[str, torch.Tensor]) -> None:
        """Take this rank's share of a Hugging Face Llama's weights."""
        size, rank = dist.get_world_size(), dist.get_rank()
        names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        names |= {each: f"self_attn.{each}_proj" for each in "qkvo"}
        names |= {each: f"mlp.{each}_proj" for each in ("gate", "up", "down")}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parts = name.split(".")
                source = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}.get(name)
                if parts[0] == "layers":
                    source = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
                tensor = whole[source or f"model.{name}"]
                dim = 1 if parts[-2] in ("o", "down") else 0
                parameter.copy_(tensor if tensor.shape == parameter.shape else tensor.chunk(size, dim)[rank])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        elsewhere = (input_ids < self.first) | (input_ids >= self.first + self.rows)
        local = self.embedding((input_ids - self.first).masked_fill(elsewhere, 0))
        x = Reduce.apply(local.masked_fill(elsewhere[..., None], 0))
        angles = torch.outer(torch.arange(input_ids.shape[1]), self.frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(Enter.apply(self.norm(x)))
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return Loss.apply(logits.flatten(0, 1), shifted.flatten(), self.first)
