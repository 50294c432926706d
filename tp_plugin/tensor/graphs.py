"""Where torch.compile's graphs begin and end: what of dynamo has no public name stands here, and nowhere else."""

from __future__ import annotations

from typing import Any

from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import skip_code

__all__ = ["end_graph", "skip", "trace_once"]


def end_graph() -> None:
    """Called by a function that dynamo skips: nothing more is compiled until the compiled call returns."""
    set_eval_frame(None)


def trace_once(forward: Any) -> None:
    """Have torch.compile begin at a model's own forward, below its decorators.

    A graph that ends at the head ends each function around it, too: it would trace all of them, one after the other.
    """
    while hasattr(forward, "__wrapped__"):
        skip_code(forward.__code__)
        forward = forward.__wrapped__
