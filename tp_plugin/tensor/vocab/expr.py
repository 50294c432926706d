"""Deferred values with one row per token and one column per vocabulary entry, computed block by block.

An expression is a tree of operations over tensors. Any block of its rows and columns can be computed by itself, so a
rank that holds some columns of the head's output computes these, in pieces of any size, and with another rank's output
in place of its own it computes that rank's columns.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.tensor.peer_reads import Number
from tp_plugin.tensor.vocab.vocabulary import Columns

Rows = slice | torch.Tensor
"""Which tokens: a slice, or indices (n,)."""

ALL = slice(None)


class Expr:
    """One deferred value; ``dtype`` is that of its blocks."""

    dtype: torch.dtype
    depth = 0
    """Temporaries of a block's size that computing a block takes, about."""

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

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        first, last = columns
        return self.data[:, first - self.start : last - self.start][rows]


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

    With ``of_columns`` it is given ``columns`` as well. It takes about ``temporaries`` of a block's size.
    """

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    dtype: torch.dtype
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    of_columns: bool = False
    temporaries: int = 1

    def __post_init__(self) -> None:
        self.depth = self.temporaries + sum(arg.depth for arg in self.args if isinstance(arg, Expr))

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        args = [arg.block(rows, columns) if isinstance(arg, Expr) else arg for arg in self.args]
        kwargs = {**self.kwargs, "columns": columns} if self.of_columns else self.kwargs
        return self.function(*args, **kwargs)

    def gradient(self, position: int, grad: Expr) -> Expr:
        """The gradient with respect to the argument at ``position`` of an element-wise function, given the result's."""
        dtype = self.args[position].dtype
        if self.function is torch.Tensor.to:
            return cast(grad, dtype)
        of = {"function": self.function, "position": position, "kwargs": self.kwargs}
        return Apply(derivative, (grad, *self.args), dtype, of, temporaries=3 + self.depth)


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
        self.dtype, self.depth = self.of.dtype, self.of.depth + 1

    def block(self, rows: Rows, columns: Columns) -> torch.Tensor:
        index = self.index[rows]
        if not self.has_gaps:
            return self.of.block(index, columns)
        return self.of.block(index.clamp(min=0), columns).masked_fill((index < 0).unsqueeze(-1), 0)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """``expr`` in ``dtype``."""
    return expr if expr.dtype == dtype else Apply(torch.Tensor.to, (expr, dtype), dtype)


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
        if isinstance(node, HeadOutput):
            found.append(node.number)
        return node

    visit(value, note)
    return max(found, default=None)


def signature(value: Any) -> str:
    """The same for the same computation on every rank, and for another one another."""
    if isinstance(value, HeadOutput):
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
        inside = (at >= first) & (at < last)
        block.scatter_add_(-1, (at - first).clamp(0, last - first - 1), weight.masked_fill(~inside, 0))
    return block


def take(block: torch.Tensor, at: torch.Tensor, columns: Columns) -> torch.Tensor:
    """The entries ``at`` (rows, k) of rows of which ``block`` has some columns; zero where it has not."""
    first, last = columns
    if first == last:
        return block.new_zeros(at.shape)
    inside = (at >= first) & (at < last)
    return block.gather(-1, (at - first).clamp(0, last - first - 1)).masked_fill(~inside, 0)


def pad(block: torch.Tensor, width: int) -> torch.Tensor:
    """Zero columns up to ``width``."""
    return block if block.shape[-1] == width else F.pad(block, (0, width - block.shape[-1]))


PIECES = 10
"""Blocks that a rank's rows or columns are computed in, for each temporary of a block's size."""

SMALLEST = 1 << 16
"""Elements of a block that is not worth dividing."""


def pieces(length: int, other: int, depth: int) -> Iterator[tuple[int, int]]:
    """Ranges of a dimension of ``length``, so that blocks with ``depth`` temporaries stay small."""
    step = max(-(-length // (PIECES * (1 + depth))), min(length, SMALLEST // max(other, 1)), 1)
    return ((first, min(first + step, length)) for first in range(0, length, step))
