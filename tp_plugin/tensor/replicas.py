"""Gradients of replicated elements, summed over the ranks that share them: in few flat buckets per backward.

A backward adds up this rank's parts in ``.grad``, as without us. What stood there before is a whole gradient; the first
of the ranks keeps it and the others blank theirs, so that the sum over the ranks has it once. A bucket that is full is
summed while the backward goes on, what is left when it has ended.

What reads gradients earlier than that decides where the sum has to be:

    a hook of the script's or of ZeRO on the parameter   in the hook that sums this parameter's alone, which runs first
    another engine of DeepSpeed, ``torch.autograd.grad``,
    a backward that is itself recorded                   the same
    FSDP2, for a group of parameters at a time           before it reads them: what was collected so far
    DDP, which averages them over other ranks            after it, when the backward has ended: sum and average commute.
                                                         What one unit has not used gets the others' average there, so
                                                         all parameters of the module are summed, used or not
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tp_plugin.mesh.buckets import Bucket, buckets
from tp_plugin.mesh.groups import Group
from tp_plugin.tensor.on_shards import on_shards

Piece = tuple[Group, int | None, tuple[tuple[int, int], ...]]
"""A group, and the local ranges of a dimension that its ranks share (None: the whole tensor)."""

BUCKET = 32 * 2**20
"""Bytes of gradients that are worth a collective before the backward has ended."""


class ReplicaSum:
    """Of one parameter: what its ranks share, and the tensor hook.

    Attributes:
        at_once: whether an engine may read the gradient while the backward runs.
    """

    def __init__(self, pieces: list[Piece], sums: ReplicaSums):
        self.pieces, self.sums, self.at_once = pieces, sums, False

    def hook(self, parameter: Any) -> None:
        """Register on ``parameter``, a leaf of autograd's graph."""
        # a leaf takes a hook only while it requires grad; it keeps the hook when it is frozen and thawed
        trained = parameter.requires_grad
        parameter.requires_grad_(True)
        parameter.register_hook(functools.partial(self._run, weakref.ref(parameter)))
        parameter.requires_grad_(trained)

    def shared(self, grad: torch.Tensor) -> Iterator[tuple[Group, torch.Tensor]]:
        """The parts of ``grad`` that other ranks have, too."""
        for group, dim, ranges in self.pieces:
            if dim is None:
                yield group, grad
            else:
                yield from ((group, grad.narrow(dim, a, b - a)) for a, b in ranges)

    def _run(self, reference: weakref.ref[Any], grad: torch.Tensor) -> torch.Tensor | None:
        parameter = reference()
        if parameter is not None and self.sums.collect(self, parameter):
            return None
        grad = grad.clone(memory_format=torch.contiguous_format)
        for bucket in buckets(self.shared(grad)):
            bucket.start_sum()
            bucket.finish()
        return grad


Summed = tuple[ReplicaSum, Any]
"""A parameter, after what is known of its sum."""


class ReplicaSums:
    """The sums of one process, in the backward that runs and in those that run within it (checkpointing)."""

    def __init__(self) -> None:
        self._collects = False
        self._averaged: dict[int, Summed] = {}
        self._waiting: dict[int, Summed] = {}
        self._under_way: dict[int, list[Bucket]] = {}
        self._bytes = 0

    @contextlib.contextmanager
    def backward(self, accumulates: bool) -> Iterator[None]:
        """Around a backward that adds to ``.grad``, or that returns gradients; at the end all sums are in ``.grad``."""
        outer, self._collects = self._collects, accumulates
        try:
            yield
            if accumulates and not outer:
                self._waiting.update(self._averaged)
                self.flush()
        finally:
            self._collects = outer
            if not outer:  # nothing is left but of a backward that has raised
                for kept in (self._averaged, self._waiting, self._under_way):
                    kept.clear()
                self._bytes = 0

    def collect(self, one: ReplicaSum, parameter: Any) -> bool:
        """Called before ``parameter`` accumulates a gradient; returns whether it is summed later."""
        if not self._collects:
            return False
        if id(parameter) in self._averaged:
            return True
        if one.at_once or _has_readers(parameter):
            return False
        if id(parameter) in self._under_way:
            self.flush()  # a second gradient in one backward, and the first is on its way
        if id(parameter) not in self._waiting:
            if self._bytes >= BUCKET:  # those before this one have accumulated theirs
                self._start()
            if parameter.grad is not None:
                _count_once([(one, parameter)])
            self._waiting[id(parameter)] = one, parameter
            self._bytes += parameter.numel() * parameter.element_size()
        return True

    def average_first(self, members: Iterable[Summed]) -> None:
        """A module whose gradients DDP averages has got one for its output: those of ``members`` are summed last."""
        if self._collects:
            new = [each for each in members if id(each[1]) not in self._averaged and not _has_readers(each[1])]
            _count_once(new)
            self._averaged.update((id(parameter), (one, parameter)) for one, parameter in new)

    @on_shards
    def flush(self) -> None:
        """Sum what was collected so far, into ``.grad``."""
        self._start()
        under_way = dict.fromkeys(bucket for started in self._under_way.values() for bucket in started)
        self._under_way = {}
        for bucket in under_way:
            bucket.finish()

    def _start(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        grads = ((one, p.grad) for one, p in waiting.values() if p.grad is not None)
        started = buckets(piece for one, grad in grads for piece in one.shared(grad))
        for bucket in started:
            bucket.start_sum()
        self._under_way.update(dict.fromkeys(waiting, started))


def _has_readers(parameter: Any) -> bool:
    """Whether hooks beside ours read its gradient before the backward has ended."""
    return len(parameter._backward_hooks or ()) > 1 or bool(parameter._post_accumulate_grad_hooks)


@on_shards
def _count_once(members: Iterable[Summed]) -> None:
    """Leave what is in gradients, whole as they are, to the first of the ranks that share it."""
    grads = [(one, parameter.grad) for one, parameter in members if parameter.grad is not None]
    blank = [view for one, grad in grads for group, view in one.shared(grad) if group.rank]
    if blank:
        torch._foreach_zero_(blank)
