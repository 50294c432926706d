"""What operations on the meta device would take: bytes alive, matrix products, memory traffic, kernels.

Nothing is computed. Where a program looks at a value, it gets what an ordinary batch has: no padding, and experts that
all get their share of the tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

Product = tuple[int, int, int, int, str]
"""``(batch, M, K, N)`` of a product of matrices, and which of the first three grows with the number of tokens."""


@dataclass
class Work:
    """What is to be computed.

    Attributes:
        products: of matrices.
        attention: floating-point operations of attention kernels.
        traffic: bytes that all other operations read and write.
        kernels: operations that start a kernel.
    """

    products: list[Product] = field(default_factory=list)
    attention: float = 0.0
    traffic: float = 0.0
    kernels: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of products and attention."""
        return self.attention + sum(2.0 * b * m * k * n for b, m, k, n, _ in self.products)


class MetaLedger(TorchDispatchMode):
    """Counts what runs inside.

    Args:
        known: tensors that are nobody's.
        tokens: of a micro-batch.

    Attributes:
        live, peak: bytes of storages that were made inside and not freed; the most of it since :meth:`restart`.
        work: since :meth:`restart`.
    """

    def __init__(self, known: Iterable[torch.Tensor], tokens: int):
        super().__init__()
        self.tokens = tokens
        self.live = self.peak = 0
        self.work = Work()
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._answers = _Answers()

    def restart(self) -> None:
        """Count the peak and the work anew from here."""
        self.peak, self.work = self.live, Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, result = self._answers(func, args, kwargs)
        if not given:
            result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if type(leaf) in (torch.Tensor, nn.Parameter)]
        counts = not _is_shape(func, kwargs)
        for tensor in made:
            self._note(tensor.untyped_storage(), counts)
        if not _is_view(func):
            self._count(func, args, kwargs, made)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        if func.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided):
            return
        self.work.kernels += 1
        shape = _product(func, args, self.tokens)
        if shape is not None:
            self.work.products.append(shape)
            return
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.work.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))

    def _note(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _is_shape(func: Any, kwargs: Any) -> bool:
    """Whether a tensor is made on the meta device in a run, too: deferred logits have one for their sizes."""
    return func is aten.empty.memory_format and "dtype" not in kwargs and "device" in kwargs


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _product(func: Any, args: Any, tokens: int) -> Product | None:
    """The shape of a product; a grouped one of n groups counts as n products of equal shares of the rows."""
    packet = func.overloadpacket
    if packet in (aten.mm, aten.addmm, aten.addmm_):
        a, b = args[-2:] if packet is aten.mm else args[1:3]
        (m, k), n = a.shape, b.shape[1]
        return 1, m, k, n, "m" if m % tokens == 0 else "k" if k % tokens == 0 else ""
    if packet in (aten.bmm, aten.baddbmm):
        a, b = args[-2:] if packet is aten.bmm else args[1:3]
        return *a.shape, b.shape[2], "b"
    if packet is aten._grouped_mm:
        a, b, groups = args[0], args[1], args[2].shape[0]
        if b.dim() == 3:
            return groups, max(a.shape[0] // groups, 1), a.shape[1], b.shape[2], "m"
        return groups, a.shape[0], max(a.shape[1] // groups, 1), b.shape[-1], "k"
    if packet is aten.convolution:
        x, weight = args[:2]
        return 1, x.numel() // max(x.shape[1], 1), weight[0].numel(), weight.shape[0], "m"
    return None


class _Answers:
    """What operations give that depends on values."""

    def __init__(self) -> None:
        self._experts = 1

    def __call__(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return True, True if args[0].dtype == torch.bool else 1 if not args[0].is_floating_point() else 1.0
        if packet is aten.nonzero:  # as many as there are, in a mask of all experts; a share of the tokens in one's
            mask = args[0]
            count = mask.numel()
            if mask.dim() == 1:
                self._experts = max(count, 1)
            else:
                count = -(-count // self._experts)
            return True, torch.empty(count, mask.dim(), dtype=torch.int64, device=mask.device)
        if packet is aten._grouped_mm:  # the meta device's takes bf16 only
            a, b, groups = args[0], args[1], args[2].shape[0]
            shape = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (groups, a.shape[0], b.shape[1])
            return True, a.new_empty(shape)
        if packet in (aten.histc, aten.bincount):
            bins = args[1] if len(args) > 1 else kwargs.get("bins", 1)
            dtype = args[0].dtype if packet is aten.histc else torch.int64
            return True, torch.empty(bins, dtype=dtype, device=args[0].device)
        return False, None


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and the sum of exponentials of each row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool, work: Any) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        output = torch.empty_like(query)  # laid out as the queries are, which decides whether it is copied later
        if value.shape[-1] != width:
            output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.work, ctx.flops = work, 2.0 * batch * heads * tokens * key.shape[2] * (width + value.shape[-1])
        ctx.flops /= 2 if causal else 1
        work().attention += ctx.flops
        work().kernels += 1
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.work().attention += 2.5 * ctx.flops
        ctx.work().kernels += 2
        grads = (
            t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (query, key, value)
        )
        return *grads, None, None


class FusedKernels(TorchFunctionMode):
    """Fused kernels of the device in place of what the meta device would take for them."""

    def __init__(self, ledger: MetaLedger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            query, key, value, *rest = args
            mask = rest[0] if rest else kwargs.get("attn_mask")
            dropout = rest[1] if len(rest) > 1 else kwargs.get("dropout_p", 0.0)
            # no fused kernel spreads one key head over several query heads by itself
            alike = key.shape[1] == query.shape[1] or kwargs.get("enable_gqa", False)
            if alike and not dropout and (mask is None or not mask.requires_grad):
                causal = bool(kwargs.get("is_causal", rest[2] if len(rest) > 2 else False)) or mask is not None
                output: torch.Tensor = _Attention.apply(query, key, value, causal, lambda: self.ledger.work)
                return output
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(known: Iterable[torch.Tensor], tokens: int) -> Iterator[MetaLedger]:
    """Count what runs inside."""
    with MetaLedger(known, tokens) as ledger, FusedKernels(ledger):
        yield ledger
