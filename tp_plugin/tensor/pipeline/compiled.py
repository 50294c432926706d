"""torch.compile of a whole model compiles each layer of a stage by itself: between layers, messages are sent.

It leaves everything else to eager mode. A layer that the script has compiled by itself stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tp_plugin.tensor.graphs import Compiler, compiling_by, present_compiler


class CompiledLayers:
    """This stage's layers; each is called as torch.compile has found the call of the model.

    Args:
        layers: in order.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self._layers = layers
        self._compiler: Compiler = None

    def present(self) -> Compiler:
        """What compiles functions that are called here; the layers learn to be called with it. Called in no graph."""
        compiler = present_compiler()
        if compiler is not None:
            for layer in self._layers:
                if layer._compiled_call_impl is None:  # torch's slot for what layer.compile() makes
                    layer._compiled_call_impl = functools.partial(self._call, layer)
        return compiler

    @contextlib.contextmanager
    def by(self, compiler: Compiler) -> Iterator[None]:
        """Around a forward, and around the backward, in which checkpointing may call layers again."""
        outer, self._compiler = self._compiler, compiler
        try:
            with compiling_by(None):
                yield
        finally:
            self._compiler = outer

    def _call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        with compiling_by(self._compiler):
            return layer._call_impl(*args, **kwargs)
