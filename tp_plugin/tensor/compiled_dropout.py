"""Sharded random streams under torch.compile: dropouts by seed, for a graph cannot switch generators on its way.

A backend may draw all random numbers of a graph at its beginning (inductor does), or run operations in another order.
So inside a sharded region of a traced model dropout, and attention with dropout, become operators that are told their
seed: one draw from the replicated stream for the region, which is the same on all ranks, the region's own key and the
dropout's number in the region. Recomputed with the same seed, they drop the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tp_plugin.errors import TPError
from tp_plugin.tensor.generators import DefaultGenerator


def _mixed(seed: torch.Tensor) -> int:
    # multiplied by an odd constant (Knuth's, for 64 bits): neighbouring seeds have neighbouring streams otherwise
    return int(seed) * 6364136223846793005 & (1 << 63) - 1


@torch.library.custom_op("tp_plugin::dropout", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """``x`` with each entry dropped with probability ``p``; ``seed``: an integer on the CPU."""
    if p >= 1:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device).manual_seed(_mixed(seed))
    kept = torch.rand(x.shape, device=x.device, generator=generator) >= p
    return x * kept.to(x.dtype) / (1 - p)


@dropout.register_fake
def _(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _dropout_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return dropout(grad, ctx.p, *ctx.saved_tensors), None, None  # it is linear


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


dropout.register_autograd(_dropout_backward, setup_context=_dropout_context)


class SeededDropouts(TorchFunctionMode):
    """Inside, dropouts draw from a region's own stream; pushed and popped while the region is traced.

    Args:
        key: the region's key on this rank, an integer tensor (a graph's input: layers share one graph).
    """

    def __init__(self, key: torch.Tensor):
        super().__init__()
        self.key = key
        self.base: torch.Tensor | None = None
        self.drawn = 0
        self.paused = False

    def _seed(self) -> torch.Tensor:
        if self.base is None:  # a region that draws nothing leaves the replicated stream as it was
            self.base = torch.randint(1 << 62, (), device="cpu")
        self.drawn += 1
        return self.base + self.key + self.drawn

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return function(*args, **kwargs)
        if function is F.dropout or function is torch.dropout:
            return self._dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function in RANDOM:
            raise TPError(
                f"{function.__name__} inside a sharded block cannot be compiled: it would draw the same on all ranks; "
                "run this module with torch.compiler.disable"
            )
        return function(*args, **kwargs)

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
    ) -> torch.Tensor:
        if not (training and train) or p == 0.0:
            return input
        dropped: torch.Tensor = dropout(input, float(p), self._seed())
        return dropped

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        settings = is_causal, scale, enable_gqa
        if dropout_p == 0.0:
            return attend(query, key, value, attn_mask, 0.0, *settings)
        attended: torch.Tensor = attention(query, key, value, attn_mask, float(dropout_p), *settings, self._seed())
        return attended


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> torch.Tensor:
    """torch's attention."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale, enable_gqa=grouped
    )


DROPOUTS: set[Callable[..., Any]] = {
    F.dropout, torch.dropout, torch.dropout_, torch.native_dropout, F.scaled_dot_product_attention,
}  # fmt: skip
"""What drops activations in a model."""

RANDOM: set[Callable[..., Any]] = {
    torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, F.alpha_dropout, F.feature_alpha_dropout,
    F.dropout1d, F.dropout2d, F.dropout3d, F.rrelu, F.gumbel_softmax, torch.bernoulli, torch.Tensor.bernoulli,
    torch.Tensor.bernoulli_, torch.rand_like, torch.randn_like, torch.Tensor.uniform_, torch.Tensor.normal_,
    torch.multinomial,
}  # fmt: skip
"""What else draws random numbers in a model."""


class _Seeded:
    """The device's default generator as ``seed`` starts it, put back afterwards: attention takes no other."""

    def __init__(self, x: torch.Tensor, seed: torch.Tensor):
        self.generator, self.start = DefaultGenerator(x.device), _mixed(seed)

    def __enter__(self) -> None:
        self.before = self.generator.get()
        self.generator.seed(self.start)

    def __exit__(self, *error: Any) -> None:
        self.generator.set(self.before)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """An operator runs below autograd; inside, autograd records all the same."""
    with contextlib.ExitStack() as stack:
        for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        stack.enter_context(torch.enable_grad())
        yield


@torch.library.custom_op("tp_plugin::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    seed: torch.Tensor,
) -> torch.Tensor:
    """Attention whose probabilities drop by ``seed``; by whatever kernel torch chooses."""
    with _Seeded(query, seed):
        return attend(query, key, value, mask, p, causal, scale, grouped).contiguous()


@attention.register_fake
def _(query: torch.Tensor, key: Any, value: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("tp_plugin::attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value. Attends again, as a kernel's own state is not ours to keep."""
    with _recording(), _Seeded(query, seed):
        q, k, v = (each.detach().requires_grad_() for each in (query, key, value))
        grads = torch.autograd.grad(attend(q, k, v, mask, p, causal, scale, grouped), (q, k, v), grad)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@attention_backward.register_fake
def _(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> Any:
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value))


def _attention_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, mask, seed = ctx.saved_tensors
    if mask is not None and mask.requires_grad:
        raise TPError("attention with a trained bias and dropout cannot be compiled; set its dropout to 0")
    return *attention_backward(grad, query, key, value, mask, *ctx.settings, seed), *[None] * 6


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, mask, *ctx.settings, seed = inputs
    ctx.save_for_backward(query, key, value, mask, seed)


attention.register_autograd(_attention_backward, setup_context=_attention_context)
