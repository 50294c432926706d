"""The dropout masks of one process inside a sharded region: drawn whole, of which this rank takes its part.

All ranks draw the whole mask from the replicated generator, so that it moves on as one process' does. The draw is the
very operation that torch makes of a dropout (``bernoulli_`` on the CPU, ``native_dropout`` on devices, whose kernels
number their random numbers by the elements of the whole tensor), repeated on an empty tensor of the whole shape. What
is computed with the mask stays torch's own.

Two modes do it. A :class:`WholeMasks` lies on the stack while the region runs and looks at nothing but the functions
that draw. Around such a call a :class:`_Draws` sees the operations that it consists of; attention without a fused
kernel consists of matrix products and a dropout.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from tp_plugin.policy.layout import Parts, Range
from tp_plugin.tensor.compiled_dropout import DROPOUTS, RANDOM
from tp_plugin.tensor.generators import OwnStream

logger = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """Of dimension ``dim``, which is ``whole`` long in one process, this rank has ``ranges``.

    Attributes:
        step: how far apart they lie here, with padding between and behind them; 0: one behind the other.
    """

    dim: int
    whole: int
    ranges: tuple[Range, ...]
    step: int = 0

    def folded(self, batch: int, step: int) -> Cut:
        """The same of a dimension that ``batch`` samples are folded into, each of which takes up ``step`` here."""
        samples = range(0, batch * self.whole, self.whole)
        ranges = tuple((at + start, at + stop) for at in samples for start, stop in self.ranges)
        return Cut(0, batch * self.whole, ranges, step)

    def whole_like(self, mine: torch.Tensor) -> torch.Tensor:
        """An empty tensor of the whole shape, whose dimensions lie in memory as those of ``mine``."""
        shape = list(mine.shape)
        shape[self.dim] = self.whole
        # a dimension of one has the stride of the dimension around it
        strides = mine.stride()
        order = sorted(range(mine.dim()), key=lambda dim: (-strides[dim], mine.shape[dim] == 1))
        return mine.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(mine.dim())])

    def take(self, mine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Fill ``mine`` with this rank's part of ``whole``, and its padding with ones."""
        at = 0
        if _width(self.ranges) < mine.shape[self.dim]:
            mine.fill_(1)
        for start, stop in self.ranges:
            mine.narrow(self.dim, at, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
            at += self.step or stop - start
        return mine


Cuts = Callable[[torch.Size], Cut | None]
"""How a tensor of this shape is split inside a region; None: nobody knows."""


@dataclass(frozen=True)
class CutHeads:
    """Attention weights (batch, heads, q, k), or ``folded`` (batch · heads, q, k): each rank has ``parts`` of heads."""

    parts: Parts
    rank: int
    folded: bool = False

    def __call__(self, shape: torch.Size) -> Cut | None:
        ranges, whole = self.parts[self.rank], _whole(self.parts)
        mine = _width(ranges)
        if self.folded and len(shape) == 3 and shape[0] % mine == 0:
            return Cut(0, whole, ranges).folded(shape[0] // mine, 0)
        return Cut(1, whole, ranges) if not self.folded and len(shape) == 4 and shape[1] == mine else None


@dataclass(frozen=True)
class CutFeatures:
    """Activations of whose last dimension each rank has its part, as one of several ``inputs`` of linears is split."""

    inputs: tuple[Parts, ...]
    rank: int

    def __call__(self, shape: torch.Size) -> Cut | None:
        for parts in self._known:
            if shape[-1] == _width(parts[self.rank]):
                return Cut(len(shape) - 1, _whole(parts), parts[self.rank])
        return None

    @functools.cached_property
    def _known(self) -> tuple[Parts, ...]:
        """The inputs; none if some rank could take one for another by its width, so that ranks may not agree."""
        inputs = tuple(dict.fromkeys(self.inputs))
        alike = any(len({_width(ranges) for ranges in of_rank}) < len(inputs) for of_rank in zip(*inputs, strict=True))
        return () if alike else inputs


def _width(ranges: tuple[Range, ...]) -> int:
    return sum(stop - start for start, stop in ranges)


def _whole(parts: Parts) -> int:
    return max(stop for part in parts for _, stop in part)


class WholeMasks(TorchFunctionMode):
    """Lies on the stack of modes from :meth:`begin` to :meth:`end`.

    Args:
        path: of the block, for the log.
        cuts: how the tensors inside are split; None: they are not.
        own: what draws where nobody knows how a tensor is split.
    """

    def __init__(self, path: str, cuts: Cuts | None, own: OwnStream):
        super().__init__()
        self._draws = _Draws(path, cuts, own)

    def begin(self) -> None:
        """What runs from here on runs inside."""
        torch._C._push_on_torch_function_stack(self)

    def end(self) -> None:
        """It has run; does nothing where something else lies on top, which an exception has left there."""
        if _get_current_function_mode() is self:
            torch._C._pop_torch_function_stack()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        quiet = function not in _DRAWING or kwargs.get("dropout_p") == 0.0
        # the innermost of the modes has begun to draw, if one has
        if quiet or isinstance(_get_current_dispatch_mode(), _Draws):
            return function(*args, **kwargs)
        with self._draws:
            return function(*args, **kwargs)


class _Draws(TorchDispatchMode):
    """Sees the operations of one function that draws."""

    def __init__(self, path: str, cuts: Cuts | None, own: OwnStream):
        super().__init__()
        self.path, self.cuts, self.own = path, cuts, own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.cuts is None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func in _COMPOSED:  # in inference mode they come as they are
            with self:
                return func.decompose(*args, **kwargs)
        x: torch.Tensor = args[0]
        cut = self.cuts(x.shape) if func in _DROPOUT else None
        if cut is None:
            return self._draw_own(func, x, args, kwargs)
        whole = cut.whole_like(x)
        if func is aten.bernoulli_.float:
            return cut.take(x, func(whole, *args[1:], **kwargs))
        mask = cut.take(torch.empty_like(x, dtype=torch.bool), func(whole, *args[1:])[1])
        scale = 1.0 if args[2] is False else 1 / (1 - args[1]) if args[1] < 1 else 0.0
        return aten.native_dropout_backward(x, mask, scale), mask  # it multiplies as the forward does

    def _draw_own(self, func: Any, x: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device") or getattr(x, "device", None) or torch.get_default_device()
        self.own.begin(torch.device(device))
        try:
            return func(*args, **kwargs)
        finally:
            if self.own.end():  # attention in which nothing drops draws nothing
                name = func.overloadpacket.__name__
                if "attention" in name:
                    draws_own(f"the attention kernel {name}")
                else:
                    shape = f" of the shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else ""
                    place = re.sub(r"[.][0-9]+(?=[./])", ".*", self.path)  # once for all layers
                    draws_own(f"{place}, where {name}{shape} is split as no policy says,")


def attends_elsewhere(attention: nn.Module) -> bool:
    """Whether its kernel is none of torch's, whose draws nobody sees; says so."""
    config = next((each.config for each in attention.modules() if hasattr(each, "config")), None)
    kernel = getattr(config, "_attn_implementation", None)
    if kernel in (None, "eager", "sdpa", "flex_attention"):
        return False
    draws_own(f"the attention kernel {kernel}")
    return True


def draws_whole(device: torch.device) -> bool:
    """Whether dropout on ``device`` is one of the operations that are known here; says so if not."""
    known = device.type in ("cpu", "cuda", "xpu", "mps")
    if not known:
        draws_own(f"the device type {device.type}")
    return known


@functools.cache
def draws_own(what: str) -> None:
    """Say once that ``what`` has not the masks of one process."""
    logger.warning("%s draws dropout masks of its own on each TP rank, which are not those of one process", what)


_DROPOUT = (aten.bernoulli_.float, aten.native_dropout.default)
_COMPOSED = (
    aten.dropout.default, aten.dropout_.default,
    aten.scaled_dot_product_attention.default, aten._scaled_dot_product_attention_math.default,
)  # fmt: skip
_FACTORIES = {torch.rand, torch.randn, torch.randint, torch.randint_like, torch.randperm, torch.normal}
_DRAWING = DROPOUTS | RANDOM | _FACTORIES
