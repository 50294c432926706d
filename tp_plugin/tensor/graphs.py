"""Where torch.compile's graphs begin and end: what of dynamo has no public name stands here, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import skip_code

__all__ = ["end_graph", "refuse_tracer", "runs_untraced", "skip", "trace_once", "untraced"]


def end_graph() -> None:
    """Called by a function that dynamo skips: nothing more is compiled until the compiled call returns."""
    set_eval_frame(None)


def untraced(kind: type) -> None:
    """Graphs end at tensors of class ``kind``: a graph would be told their shape, and guard it by their memory's."""
    torch._dynamo.config.nontraceable_tensor_subclasses.add(kind)


def refuse_tracer() -> None:
    """Called where the values of tensors are used: dynamo, which would take them for constants, leaves the frame."""
    if torch.compiler.is_compiling():
        raise torch._dynamo.exc.SkipFrame("weights of a sharded model are read")


def runs_untraced(function: Any) -> None:
    """``function`` is no graph of its own, and not looked into where Python calls it; it can be a part of a graph."""
    while hasattr(function, "__wrapped__"):
        skip_code(function.__code__)
        function = function.__wrapped__
    skip_code(function.__code__)


def trace_once(forward: Any) -> None:
    """Have torch.compile begin at a model's own forward, below its decorators.

    A graph that ends at the head ends each function around it, too: it would trace all of them, one after the other.
    """
    while hasattr(forward, "__wrapped__"):
        skip_code(forward.__code__)
        forward = forward.__wrapped__
