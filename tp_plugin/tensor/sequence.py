"""Sequence parallelism (Korthikanti et al. 2022): between the blocks of a stack of layers each rank has its tokens.

Before the first layer the hidden states are split along the sequence, behind the last they are joined. A block gathers
its input and reduce-scatters its output, where it would all-reduce both otherwise: the same bytes, and norms, residuals
and dropouts on 1/tp of the tokens. Parameters used there get their gradient from these tokens only; it is summed.

It acts wherever gradients are recorded. A sequence that tp does not divide is filled up with zeros that no block sees.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group, Pending
from tp_plugin.tensor import regions, rng
from tp_plugin.tensor.first_order import apply, first_order
from tp_plugin.tensor.graphs import assume_constant_result
from tp_plugin.tensor.whole_masks import Cut

SEQUENCE = 1
"""The dimension of the tokens in (batch, sequence, hidden)."""


class Stack:
    """One stack of layers that run one after the other on the same hidden states.

    ``length`` is the sequence's length in the forward that runs, or whose layers are recomputed for the backward;
    ``ran`` says whether the last forward split it.
    """

    def __init__(self, path: str, group: Group):
        self.path, self.group = path, group
        self.length = 0
        self.active = self.ran = False

    def split(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook (with kwargs) of the first layer."""
        if not _in_backward():
            self.active = self.ran = torch.is_grad_enabled()
        if not self.runs:
            return args, kwargs
        recompute = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(layer, "gradient_checkpointing", False) and recompute.get("use_reentrant"):
            raise TPError(
                "sequence_parallel does not work with reentrant checkpoints; write gradient_checkpointing_kwargs: "
                "{use_reentrant: false}"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            raise TPError(
                f"sequence_parallel: the first argument of {self.path}'s layers must be hidden states (batch, "
                "sequence, hidden); turn sequence_parallel off for this architecture"
            )
        self.length = x.shape[SEQUENCE]
        mine = apply(Split, x, self.group)
        if args:
            return (mine, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): mine}

    def join(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the last layer."""
        if not self.runs:
            return output
        self.active = False
        first, *rest = output if isinstance(output, tuple) else (output,)
        joined = apply(Join, first, self, self.length)
        return (joined, *rest) if isinstance(output, tuple) else joined

    def abandon(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every layer (always called): one that raised ends the stack."""
        if output is None:
            self.active = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens → all tokens, at the input of a block."""
        entered: torch.Tensor = apply(Gather, x, *self.span(x), self.group)
        return entered

    @property
    def regathers(self) -> bool:
        """Whether the backward gathers again what enters a block, which is then not kept."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False  # the compiler decides what is kept
        # layers that are recomputed keep nothing anyhow
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def keep(self, x: torch.Tensor, entered: torch.Tensor, others: bool) -> Regather:
        """What gathers the tokens of ``x`` again for the backward, so that only this rank's are kept.

        Args:
            others: look for them among what autograd keeps for others than the block's own linears.
        """
        dim, length = self.span(x)
        return Regather(x.detach(), dim, length, entered, self.group, others)

    def leave(self, product: torch.Tensor) -> torch.Tensor:
        """This rank's part of a sum over all tokens → the sum of its own tokens, after a row-parallel product."""
        mine: torch.Tensor = apply(Scatter, product, self._dim(product), self.group)
        return mine

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of all tokens."""
        return own_tokens(x, self._dim(x), self.group)

    @property
    def runs(self) -> bool:
        """Whether what runs now runs on a part of the tokens: a forward, or a layer that is recomputed."""
        return self.active or _in_backward()

    def _dim(self, x: torch.Tensor) -> int:
        return SEQUENCE if x.dim() > 2 else 0

    def span(self, x: torch.Tensor) -> tuple[int, int]:
        """The dimension of the tokens, and how many there are on all ranks."""
        # (tokens, hidden): an MLP or experts, to which one token is like another, so that their order does not matter
        dim = self._dim(x)
        return dim, self.length if dim == SEQUENCE else x.shape[0] * self.group.size


class Regather:
    """While a block's forward runs, autograd keeps this rank's tokens in the place of its gathered input.

    In the backward the first linear that needs the whole input gathers it, for all of the block's linears.
    """

    def __init__(self, mine: torch.Tensor, dim: int, length: int, entered: torch.Tensor, group: Group, others: bool):
        self.mine, self.dim, self.length, self._group = mine, dim, length, group
        self._entered, self._version = weakref.ref(entered), entered._version
        self._kept = self._to_come = 0
        self._gathering: Pending | None = None
        self._again: torch.Tensor | None = None
        self._packed = False
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack) if others else None
        if self._hooks is not None:
            self._hooks.__enter__()

    def end(self) -> bool:
        """The block's linears have run; returns whether autograd was to keep the gathered input for others, too."""
        if self._hooks is not None:
            self._hooks.__exit__()
        return self._packed

    def _pack(self, tensor: torch.Tensor) -> Any:
        entered = self._entered()
        if (
            entered is not None
            and tensor.untyped_storage()._cdata == entered.untyped_storage()._cdata
            and tensor.numel() == entered.numel()
            and tensor.is_contiguous()
            and tensor._version == self._version  # not changed in place
        ):
            self.count()
            self._packed = True
            return tensor.shape
        return tensor

    def count(self) -> None:
        """Somebody will :meth:`take` the gathered input in the backward."""
        self._kept += 1

    def start(self) -> None:
        """Begin to gather, if it has not begun."""
        if self._again is None and self._gathering is None:
            self._gathering = self._group.start_all_gather(self.mine)
            self._to_come = self._kept

    def _unpack(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return self.take().view(kept)

    def take(self) -> torch.Tensor:
        """The gathered input."""
        self.start()
        if self._again is None:
            assert self._gathering is not None
            self._again = _concatenated(self._gathering.wait(), self.dim, self.length)
            self._gathering = None
        found = self._again
        self._to_come -= 1
        if self._to_come == 0:
            self._again = None
        return found


@assume_constant_result  # true of a graph: it is traced anew where a layer is recomputed, ``active`` says
def _in_backward() -> bool:
    # a layer that runs then is recomputed (torch.utils.checkpoint asks the same)
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(frozen=True)
class Tokens:
    """How (batch, sequence, hidden), or (batch · sequence, hidden), is split between the blocks of a stack."""

    stack: Stack

    def __call__(self, shape: torch.Size) -> Cut | None:
        group, length = self.stack.group, self.stack.length
        own = -(-length // group.size)
        start = min(own * group.rank, length)
        mine = start, start + _owned(length, own, group.rank)
        if len(shape) == 3 and shape[SEQUENCE] == own:
            return Cut(SEQUENCE, length, (mine,))
        if len(shape) == 2 and shape[0] % own == 0:
            return Cut(0, length, (mine,)).folded(shape[0] // own, own)
        return None


class LayerRegion:
    """Hooks of a layer: its dropouts outside the blocks act on this rank's tokens.

    Args:
        exact: they drop what one process drops of these; else each rank draws masks of its own.
    """

    def __init__(self, path: str, stack: Stack, tp_rank: int, exact: bool):
        self.stack, self.draws = stack, rng.Dropouts()
        self.region = rng.ShardedRegion(path + "/sequence", tp_rank, Tokens(stack) if exact else None)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook (with kwargs)."""
        if layer.training and self.stack.runs and self.draws(layer):
            x = args[0] if args else next(iter(kwargs.values()))
            if self.region.nests and getattr(layer, "gradient_checkpointing", False):
                checkpoint = layer._gradient_checkpointing_func
                if not isinstance(checkpoint, rng.RegionCheckpoint):
                    layer._gradient_checkpointing_func = rng.RegionCheckpoint(checkpoint, self.region, x.device)  # type: ignore[assignment]
            else:
                self.region.begin(x.device)

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Forward hook (always called)."""
        self.region.end()


def own_tokens(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """This rank's equal part of ``x`` along ``dim``, filled up with zeros."""
    own = -(-x.shape[dim] // group.size)
    first = min(own * group.rank, x.shape[dim])
    mine = x.narrow(dim, first, min(own, x.shape[dim] - first))
    return fill(mine, dim, own).contiguous()


def fill(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """``x`` with zeros up to ``length`` along ``dim``."""
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def gather_tokens(x: torch.Tensor, dim: int, length: int, group: Group) -> torch.Tensor:
    """The parts of all ranks, without what they were filled up with."""
    return _concatenated(group.gathered(x), dim, length)


def _concatenated(parts: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """(size, …, own, …) → (…, length, …), contiguous, for layers call view() on what they get.

    The ranks' parts lie one behind the other, which is their order already where no dimension stands before that of
    the tokens but a batch of one. Else each is copied to its place, once.
    """
    size, shape = parts.shape[0], parts.shape[1:]
    own = shape[dim]
    if dim == 0 or shape[0] == 1:
        whole = parts.view(*shape[:dim], size * own, *shape[dim + 1 :])
        return whole if length == size * own else whole.narrow(dim, 0, length)
    return torch.cat([part.narrow(dim, 0, _owned(length, own, rank)) for rank, part in enumerate(parts.unbind(0))], dim)


def _owned(length: int, own: int, rank: int) -> int:
    """How many tokens of ``length`` a rank has, beside what fills it up to ``own``."""
    return min(own, max(0, length - own * rank))


def reduce_scatter_tokens(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """This rank's part of the sum of ``x`` over the ranks."""
    return group.reduce_scatter(_chunks(x, dim, group))


def start_reduce_scatter_tokens(x: torch.Tensor, dim: int, group: Group) -> Pending:
    """Begin :func:`reduce_scatter_tokens`."""
    return group.start_reduce_scatter(_chunks(x, dim, group))


def _chunks(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """(…, length, …) → (size, …, own, …), contiguous: ``x`` itself, or one copy of it, as in :func:`_concatenated`."""
    size, length = group.size, x.shape[dim]
    own = -(-length // size)
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    if length == own * size:
        # not unflatten, which torch.compile does not trace where dropouts are seeded
        return x.reshape(*before, size, own, *after).movedim(dim, 0).contiguous()
    chunks = x.new_zeros(size, *before, own, *after)
    full = length // own
    chunks[:full] = x.narrow(dim, 0, full * own).reshape(*before, full, own, *after).movedim(dim, 0)
    if full < size:
        rest = length - full * own
        chunks[full].narrow(dim, 0, rest).copy_(x.narrow(dim, full * own, rest))
    return chunks


class Split(torch.autograd.Function):
    """Whole → part; every rank has the whole, so the gradient is put together again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group, ctx.length = group, x.shape[SEQUENCE]
        return own_tokens(x, SEQUENCE, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_tokens(grad, SEQUENCE, ctx.length, ctx.group), None


class Join(torch.autograd.Function):
    """Part → whole; what follows is the same on every rank, so each takes its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack, length: int) -> torch.Tensor:
        ctx.stack, ctx.length = stack, length
        return gather_tokens(x, SEQUENCE, length, stack.group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.compiler.is_compiling():  # a graph recomputes by itself
            ctx.stack.length = ctx.length  # for layers that are recomputed; this comes before them all
        return own_tokens(grad, SEQUENCE, ctx.stack.group), None, None


class Gather(torch.autograd.Function):
    """Part → whole, of which each rank uses its shard: the gradients are summed, each rank keeps its part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, length: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return gather_tokens(x, dim, length, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return reduce_scatter_tokens(grad, ctx.dim, ctx.group), None, None, None


class Scatter(torch.autograd.Function):
    """A part of a sum over all tokens → the sum of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.length, ctx.group = dim, x.shape[dim], group
        return reduce_scatter_tokens(x, dim, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_tokens(grad, ctx.dim, ctx.length, ctx.group), None, None


def enter(x: torch.Tensor, stack: Stack | None, group: Group) -> torch.Tensor:
    """The input of a block: ``f``, or the gathering of all tokens."""
    return stack.enter(x) if stack is not None and stack.runs else regions.copy_to_tp(x, group)


def zeros(product: torch.Tensor, stack: Stack | None) -> torch.Tensor:
    """Zeros in the place of :func:`reduce`'s result."""
    if stack is not None and stack.runs:
        return torch.zeros_like(stack.own(product))
    return torch.zeros_like(product)


def reduce(product: torch.Tensor, stack: Stack | None, group: Group, fresh: bool = False) -> torch.Tensor:
    """The end of a block: ``g``, or the scattering of the tokens; ``fresh`` as in :func:`regions.reduce_from_tp`."""
    if stack is not None and stack.runs:
        return stack.leave(product)
    return regions.reduce_from_tp(product, group, fresh)
