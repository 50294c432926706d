"""Deferred values with one row per token and one column per vocabulary entry, computed block by block.

An expression is a tree over *leaves*: tensors that it names but does not hold. Any block of rows and columns can be
computed from the leaves' values, so a rank that holds some columns computes these, in pieces of any size, and with
another rank's leaves it computes that rank's columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Rows = slice | torch.Tensor
"""Which tokens: a slice, or indices."""

Columns = tuple[int, int]
"""Which vocabulary entries, ``[start, stop)``."""

ALL = slice(None)


class Leaf:
    """The name of a tensor; ``number`` is what other ranks know a head's output by, None for anything else."""

    def __init__(self, number: tuple[int, int] | None = None):
        self.number = number


class Values(NamedTuple):
    """What the leaves are on one rank, whose own columns begin at ``start``."""

    tensors: Mapping[Leaf, torch.Tensor]
    start: int


class Expr:
    """One deferred value; ``dtype`` is that of its blocks."""

    dtype: torch.dtype
    depth = 0
    """Temporaries of a block's size that computing a block takes, about."""

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        """The block of these rows and columns; may share memory with a leaf, so do not write into it."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        """Every leaf, perhaps more than once."""
        for value in vars(self).values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Leaf):
                    yield part
                elif isinstance(part, Expr):
                    yield from part.leaves()

    def signature(self, tensors: Mapping[Leaf, torch.Tensor]) -> str:
        """The same for the same computation on every rank, and for another one another."""
        parts = [type(self).__name__]
        for value in vars(self).values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Leaf):
                    parts.append(str(part.number) if part.number else digest(tensors[part]))
                elif isinstance(part, Expr):
                    parts.append(part.signature(tensors))
                else:
                    parts.append(getattr(part, "__name__", None) or repr(part))
        return f"({' '.join(parts)})"


def digest(tensor: torch.Tensor) -> str:
    """Shape and a checksum of at most some thousand elements."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: 1 + flat.numel() // 4096].to("cpu", torch.float64)
    return f"{tuple(tensor.shape)}{zlib.crc32(some.numpy().tobytes()):08x}"


@dataclass(eq=False)
class Local(Expr):
    """A tensor (rows, own columns or more) that each rank has of its own."""

    leaf: Leaf
    dtype: torch.dtype

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        first, last = columns
        return values.tensors[self.leaf][:, first - values.start : last - values.start][rows]


@dataclass(eq=False)
class Whole(Expr):
    """A tensor (·, vocabulary) that every rank has whole; ``row`` says which of its rows each token has.

    Without it each token has its own, or there is one for all.
    """

    leaf: Leaf
    dtype: torch.dtype
    row: Leaf | None = None

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        table = values.tensors[self.leaf][:, slice(*columns)]
        if self.row is not None:
            return table[values.tensors[self.row][rows]]
        return table if len(table) == 1 else table[rows]


@dataclass(eq=False)
class PerRow(Expr):
    """A tensor (rows, 1) that every rank has: the same number in all columns."""

    leaf: Leaf
    dtype: torch.dtype

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        return values.tensors[self.leaf][rows].expand(-1, columns[1] - columns[0])


@dataclass(eq=False)
class Scalar(Expr):
    """A tensor without dimensions."""

    leaf: Leaf
    dtype: torch.dtype

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        return values.tensors[self.leaf]


@dataclass(eq=False)
class Cast(Expr):
    """Another dtype."""

    of: Expr
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.depth = self.of.depth + 1

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        return self.of.pick(rows, columns, values).to(self.dtype)


LINEAR = {"mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "neg", "negative"}
"""Functions of one expression and Python numbers that are their own derivative."""


@dataclass(eq=False)
class Apply(Expr):
    """An elementwise function of expressions and constants."""

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.depth = sum(arg.depth for arg in self.args if isinstance(arg, Expr)) + 1

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        args = [arg.pick(rows, columns, values) if isinstance(arg, Expr) else arg for arg in self.args]
        return self.function(*args, **self.kwargs)

    def gradient(self, position: int, grad: Expr) -> Expr:
        """The gradient with respect to the argument at ``position``, given the one of the result."""
        argument: Expr = self.args[position]
        others = [arg for at, arg in enumerate(self.args) if at != position]
        name = getattr(self.function, "__name__", "").strip("_")
        if position == 0 and name in LINEAR and all(isinstance(other, int | float) for other in others):
            result: Expr = Apply(self.function, (grad, *others), self.kwargs, grad.dtype)
        else:
            result = Derivative(self, position, grad, self.dtype)
        return result if result.dtype == argument.dtype else Cast(result, argument.dtype)


@dataclass(eq=False)
class Derivative(Expr):
    """What autograd makes of one elementwise function, block by block."""

    of: Apply
    position: int
    grad: Expr
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.dtype = self.of.args[self.position].dtype
        self.depth = 2 * self.of.depth + self.grad.depth + 2

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        args = [arg.pick(rows, columns, values) if isinstance(arg, Expr) else arg for arg in self.of.args]
        with torch.enable_grad():
            args[self.position] = args[self.position].detach().requires_grad_()
            result = self.of.function(*args, **self.of.kwargs)
        grad = self.grad.pick(rows, columns, values).to(result.dtype)
        return torch.autograd.grad(result, args[self.position], grad)[0]


@dataclass(eq=False)
class Reordered(Expr):
    """Other tokens, or the same in another order; rows of ``index`` that are negative are zero."""

    of: Expr
    index: Leaf
    dtype: torch.dtype
    gaps: bool = False

    def __post_init__(self) -> None:
        self.depth = self.of.depth + 1

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        index = values.tensors[self.index][rows]
        if not self.gaps:
            return self.of.pick(index, columns, values)
        return self.of.pick(index.clamp(min=0), columns, values).masked_fill((index < 0).unsqueeze(-1), 0)


@dataclass(eq=False)
class OneHot(Expr):
    """Numbers ``weight`` (rows, k) at the vocabulary entries ``at`` (rows, k), zero elsewhere."""

    at: Leaf
    weight: Leaf
    dtype: torch.dtype

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        at, weight = values.tensors[self.at][rows], values.tensors[self.weight][rows]
        block = weight.new_zeros(at.shape[0], columns[1] - columns[0])
        return add_one_hot(block, at, weight, columns).to(self.dtype)


@dataclass(eq=False)
class StatisticsGradient(Expr):
    """The gradient of a row's log-sum-exp, of its entry at the label, and of its sum, each times a number per row."""

    of: Expr
    dtype: torch.dtype
    log_sum: Leaf
    labels: Leaf
    weights: Leaf  # (3, rows): of the log-sum-exp, the entry, the sum
    with_sum: bool

    def __post_init__(self) -> None:
        self.depth = self.of.depth + 1

    def pick(self, rows: Rows, columns: Columns, values: Values) -> torch.Tensor:
        log_sum, weights = values.tensors[self.log_sum][rows], values.tensors[self.weights][:, rows]
        block = self.of.pick(rows, columns, values).to(log_sum.dtype) - log_sum.unsqueeze(-1)
        block.exp_().mul_(weights[0].unsqueeze(-1))
        if self.with_sum:
            block.add_(weights[2].unsqueeze(-1))
        labels = values.tensors[self.labels][rows].unsqueeze(-1)
        return add_one_hot(block, labels, weights[1].unsqueeze(-1), columns).to(self.dtype)


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
