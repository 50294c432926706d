"""Whether all that enters a block leaves it through the block's reduction, seen in the graph that autograd recorded.

``f`` sums the gradients of what enters over the ranks, each of which has a partial one behind the reduction. An input
that the block also uses outside of its sharded part (a residual that it adds itself, a gate on its output) has the full
gradient on every rank there, and the sum would count it once per rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.tensor.regions import ReduceFromTP
from tp_plugin.tensor.sequence import Scatter

REDUCTIONS = tuple(f"{function.__name__}Backward" for function in (ReduceFromTP, Scatter))
"""Names of the nodes behind which gradients are partial."""


class BypassCheck:
    """Checks one block, at its first forward that records gradients.

    Args:
        path: the block's path, for the message.
    """

    def __init__(self, path: str):
        self.path, self.done = path, False
        self._entered: set[Any] = set()

    def enter(self, entered: Iterable[torch.Tensor]) -> None:
        """Remember what has entered the block: tensors behind ``f``."""
        if not (self.done or torch.compiler.is_compiling()):
            self._entered = {x.grad_fn for x in entered if x.requires_grad and x.grad_fn is not None}

    def leave(self, output: object) -> None:
        """Look at the block's output, a tensor or a tuple whose first element is it; None if the block raised.

        Raises:
            TPError: it depends on an input by a way around the reduction.
        """
        entered, self._entered = self._entered, set()
        first = output[0] if isinstance(output, tuple) and output else output
        if not entered or not isinstance(first, torch.Tensor) or first.grad_fn is None:
            return
        self.done = True
        oldest = min(node._sequence_nr() for node in entered)
        to_see, seen = [first.grad_fn], set()
        while to_see:
            node: Any = to_see.pop()
            if node in entered:
                raise TPError(
                    f"{self.path} uses one of its inputs outside of its sharded part (a residual that it adds itself, "
                    "a gate on its output), so the sum over the ranks would count that gradient once per rank. This "
                    "cannot be derived from transformers' base_model_tp_plan; write a policy whose block names `entry` "
                    "and `inputs` (docs, 'Add an architecture')"
                )
            if node in seen or node.name() in REDUCTIONS or node._sequence_nr() < oldest:
                continue  # what is older was computed before the block
            seen.add(node)
            to_see += [inner for inner, _ in node.next_functions if inner is not None]
