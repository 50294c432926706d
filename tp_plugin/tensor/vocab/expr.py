"""Deferred values with one row per token and one column per vocabulary entry, computed block by block.

An expression is a tree of operations over tensors. Any block of its rows and columns can be computed by itself, so a
rank that holds some columns of the head's output computes these, in pieces of any size, and with another rank's output
in place of its own it computes that rank's columns.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.errors import TPError
from tp_plugin.tensor.peer_reads import Number, PeerReads
from tp_plugin.tensor.vocab.vocabulary import Columns

Rows = slice | torch.Tensor
"""Which tokens: a slice, or indices (n,)."""

ALL = slice(None)


class Expr:
    """One deferred value; ``dtype`` is that of its blocks."""

    dtype: torch.dtype
    cost = 0
    """Bytes of temporaries that computing a block takes for each of its elements, about."""
    stored = 0
    """Bytes that an element of the head's output takes, of which this is computed."""

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        """These rows and columns; the result may share memory with an operand, so do not write into it."""
        raise NotImplementedError


@dataclass(eq=False)
class Operand(Expr):
    """A tensor with a row for each token."""

    data: torch.Tensor

    def __post_init__(self) -> None:
        self.dtype = self.data.dtype


@dataclass(eq=False)
class HeadOutput(Operand):
    """A head's output (tokens, width) on the rank whose columns begin at ``start``; other ranks know its ``number``."""

    start: int
    number: Number

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stored = self.dtype.itemsize

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        first, last = columns
        return self.data[:, first - self.start : last - self.start][rows]


@dataclass(eq=False)
class HeadProduct(Expr):
    """A head's output on this rank that is in no memory: computed where it is needed, of the head's input.

    Attributes:
        x: the input (tokens, n), in the dtype of the product.
        weight, bias: this rank's (columns, n) and (columns,).
        start: its first column.
        number: what other ranks know it by.
        peers: tells of optimizer steps.
        made: what :meth:`_now` was when the head was called.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    start: int
    number: Number
    peers: PeerReads
    made: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.cost = self.stored = self.dtype.itemsize
        if self.made is None:
            self.made = self._now()

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        """See the class.

        Raises:
            TPError: the input or the weights are no longer those of the head's call.
        """
        some = slice(columns[0] - self.start, columns[1] - self.start)
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias[some].to(self.dtype)
            found = F.linear(self.x[rows], self.weight[some].to(self.dtype), bias)
        if self._now() != self.made:  # behind it: another rank's thread may read while this one trains on
            raise TPError(
                "under `tp_plugin: {fused_head: true}` logits are computed when they are read, and the head's weights "
                "(or its input) have changed since the forward; read outputs.logits before the optimizer's step, or "
                "leave fused_head out"
            )
        return found

    def _now(self) -> tuple[int, ...]:
        tensors = (self.x, self.weight, self.bias)
        versions = (0 if each is None or each.is_inference() else each._version for each in tensors)
        return (*versions, self.peers.steps)


@dataclass(eq=False)
class Full(Operand):
    """A tensor (tokens, vocabulary) that every rank has, or (1, vocabulary) for all tokens."""

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        columns_of = self.data[:, slice(*columns)]
        return columns_of if len(columns_of) == 1 else columns_of[rows]


@dataclass(eq=False)
class PerRow(Operand):
    """A tensor (tokens, 1) that every rank has: the same number in all columns.

    Without ``is_broadcast`` it is (tokens, k), and given to a function as it is.
    """

    is_broadcast: bool = True

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        return self.data[rows].expand(-1, columns[1] - columns[0]) if self.is_broadcast else self.data[rows]


@dataclass(eq=False)
class Apply(Expr):
    """``function`` of the blocks of expressions among ``args``, and of numbers and tensors without dimensions.

    With ``of_block`` it is given ``columns`` and ``dtype`` as well: where the block lies, and what to round to in the
    end. Beside the result it takes about ``extra`` bytes of temporaries for an element.
    """

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    dtype: torch.dtype
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    of_block: bool = False
    extra: int = 0

    def __post_init__(self) -> None:
        of = [arg for arg in self.args if isinstance(arg, Expr)]
        self.cost = self.dtype.itemsize + self.extra + sum(arg.cost for arg in of)
        self.stored = max((arg.stored for arg in of), default=0)

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        args = [arg.block(rows, columns) if isinstance(arg, Expr) else arg for arg in self.args]
        kwargs = {**self.kwargs, "columns": columns, "dtype": self.dtype} if self.of_block else self.kwargs
        return self.function(*args, **kwargs)

    def gradient(self, position: int, grad: Expr) -> Expr:
        """The gradient with respect to the argument at ``position`` of an element-wise function, given the result's."""
        dtype = self.args[position].dtype
        if self.function is torch.Tensor.to:
            return cast(grad, dtype)
        of = {"function": self.function, "position": position, "kwargs": self.kwargs}
        return Apply(derivative, (grad, *self.args), dtype, of, extra=2 * dtype.itemsize + self.cost)


def derivative(
    grad: torch.Tensor, *args: Any, function: Callable[..., torch.Tensor], position: int, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """What autograd makes of ``grad`` behind ``function(*args, **kwargs)`` for the argument at ``position``."""
    inputs = list(args)
    with torch.enable_grad():
        inputs[position] = inputs[position].detach().requires_grad_()
        result = function(*inputs, **kwargs)
    found: torch.Tensor = torch.autograd.grad(result, inputs[position], grad.to(result.dtype))[0]
    return found


@dataclass(eq=False)
class TakeRows(Expr):
    """The rows ``index`` (tokens,) of another expression; negative ones are zero."""

    of: Expr
    index: torch.Tensor
    has_gaps: bool = False

    def __post_init__(self) -> None:
        self.dtype, self.stored = self.of.dtype, self.of.stored
        self.cost = self.of.cost + self.dtype.itemsize

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        index = self.index[rows]
        if not self.has_gaps:
            return self.of.block(index, columns)
        return self.of.block(index.clamp(min=0), columns).masked_fill((index < 0).unsqueeze(-1), 0)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """``expr`` in ``dtype``."""
    if isinstance(expr, Apply) and expr.of_block and torch.promote_types(expr.dtype, dtype) == expr.dtype:
        return dataclasses.replace(expr, dtype=dtype)
    return expr if expr.dtype == dtype else Apply(torch.Tensor.to, (expr, dtype), dtype)


def exact(expr: Expr) -> Expr:
    """``expr`` before casts that changed no value."""
    while isinstance(expr, Apply) and expr.function is torch.Tensor.to:
        if torch.promote_types(expr.args[0].dtype, expr.dtype) != expr.dtype:
            break
        expr = expr.args[0]
    return expr


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in an expression whose tensors are kept elsewhere."""

    at: int
    dtype: torch.dtype


def visit(value: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of an expression, a tensor, or a tuple of such, in which ``replace(node)`` stands for each node.

    Where that is the node itself, its inside is visited as well.
    """
    found = replace(value)
    if found is not value:
        return found
    if isinstance(value, tuple):
        return tuple(visit(each, replace) for each in value)
    if isinstance(value, Expr) and dataclasses.is_dataclass(value):
        fields = {each.name: visit(getattr(value, each.name), replace) for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def newest(value: Any) -> Number | None:
    """The number of the last made of the heads' outputs in an expression, or a tuple of such."""
    found: list[Number] = []

    def note(node: Any) -> Any:
        if isinstance(node, HeadOutput | HeadProduct):
            found.append(node.number)
        return node

    visit(value, note)
    return max(found, default=None)


def signature(value: Any) -> str:
    """The same for the same computation on every rank, and for another one another."""
    if isinstance(value, HeadOutput | HeadProduct):
        return str(value.number)
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, Expr) and dataclasses.is_dataclass(value):
        value = (type(value), *(getattr(value, each.name) for each in dataclasses.fields(value)))
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return f"({' '.join(signature(each) for each in value)})"
    return str(getattr(value, "__name__", value))


def digest(tensor: torch.Tensor) -> str:
    """Shape and a checksum of at most some thousand elements."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: 1 + flat.numel() // 4096].to("cpu", torch.float64)
    return f"{tuple(tensor.shape)}{zlib.crc32(some.numpy().tobytes()):08x}"


def add_one_hot(block: torch.Tensor, at: torch.Tensor, weight: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Add ``weight`` (rows, k) in place at the entries ``at`` (rows, k) of which ``block`` has columns."""
    first, last = columns
    if first < last:
        place, outside = _place(at, columns)
        block.scatter_add_(-1, place, weight.masked_fill(outside, 0))
    return block


def take(block: torch.Tensor, at: torch.Tensor, columns: Columns) -> torch.Tensor:
    """The entries ``at`` (rows, k) of rows of which ``block`` has some columns; zero where it has not."""
    first, last = columns
    if first == last:
        return block.new_zeros(at.shape)
    place, outside = _place(at, columns)
    return block.gather(-1, place).masked_fill(outside, 0)


def _place(at: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the entries ``at`` are in a block of ``columns``, and which of them are elsewhere."""
    first, last = columns
    place = at - first
    inside = place.clamp(0, last - first - 1)
    return inside, inside != place


def pad(block: torch.Tensor, width: int) -> torch.Tensor:
    """Zero columns up to ``width``."""
    return block if block.shape[-1] == width else F.pad(block, (0, width - block.shape[-1]))
