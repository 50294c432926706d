"""Where torch.compile's graphs begin and end: what of dynamo has no public name stands here, and nowhere else.

dynamo itself, which takes a second to import, is left to runs that train: its decorators would import it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
    set_eval_frame,
)

F = TypeVar("F", bound=Callable[..., Any])

GRAPHS = 4
"""Of a layer: for training and evaluation, for lengths that stay and that change."""

_untraced_classes: set[type] = set()


def skip(function: F) -> F:
    """Have dynamo not trace this function, but what it calls, as ``torch._dynamo.skip`` does."""
    return _not_traced(function, _FrameAction.DEFAULT)


def disable(function: F) -> F:
    """Have dynamo trace neither this function nor what it calls, as ``torch._dynamo.disable`` does."""
    return _not_traced(function, _FrameAction.SKIP)


def assume_constant_result(function: F) -> F:
    """Have dynamo call this function while it traces, and keep the result, as the decorator of this name does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def end_graph() -> None:
    """Called by a function that dynamo skips: nothing more is compiled until the compiled call returns."""
    set_eval_frame(None)


Compiler = Any
"""What compiles the functions that Python calls; None: they run as they are."""


def present_compiler() -> Compiler:
    """The one that torch.compile has set. Called by a function that dynamo skips, not by one that it disables."""
    return get_eval_frame_callback()


@contextlib.contextmanager
def compiling_by(compiler: Compiler) -> Iterator[None]:
    """Inside, ``compiler`` compiles what Python calls."""
    outer = set_eval_frame(compiler)
    try:
        yield
    finally:
        set_eval_frame(outer)


def untraced(kind: type) -> None:
    """Graphs end at tensors of class ``kind``: a graph would be told their shape, and guard it by their memory's."""
    _untraced_classes.add(kind)
    if "torch._dynamo" in sys.modules:
        tell_dynamo()


def tell_dynamo(model: nn.Module | None = None) -> None:
    """Import dynamo and tell it of these classes: when a model is sharded, before any of their tensors is seen.

    Layers of a sharded ``model`` that are compiled one by one share no graph, as dynamo guards the numbers of hooks.
    By default it gives up after 8 graphs of one function, and would leave the other layers to eager mode.
    """
    config = torch._dynamo.config
    config.nontraceable_tensor_subclasses.update(_untraced_classes)
    if model is not None:
        layers = max((len(stack) for stack in model.modules() if isinstance(stack, nn.ModuleList)), default=0)
        config.recompile_limit = max(config.recompile_limit, GRAPHS * layers)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * GRAPHS * layers)


def refuse_tracer() -> None:
    """Called where the values of tensors are used: dynamo, which would take them for constants, leaves the frame."""
    if torch.compiler.is_compiling():
        raise torch._dynamo.exc.SkipFrame("weights of a sharded model are read")


def runs_untraced(function: Any) -> None:
    """``function`` is no graph of its own, and not looked into where Python calls it; it can be a part of a graph."""
    while hasattr(function, "__wrapped__"):
        _skip_code(function.__code__)
        function = function.__wrapped__
    _skip_code(function.__code__)


def trace_once(forward: Any) -> None:
    """Have torch.compile begin at a model's own forward, below its decorators.

    A graph that ends at the head ends each function around it, too: it would trace all of them, one after the other.
    """
    while hasattr(forward, "__wrapped__"):
        _skip_code(forward.__code__)
        forward = forward.__wrapped__


def _not_traced(function: F, below: _FrameAction) -> F:
    _skip_code(function.__code__, below)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def _skip_code(code: types.CodeType, below: _FrameAction = _FrameAction.DEFAULT) -> None:
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, below))
