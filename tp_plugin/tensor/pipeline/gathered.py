"""Weights that FSDP2 keeps in rows are gathered once for all micro-batches of a forward, not once for each.

A rank has the whole weights of its stage from the forward until the end of the script's backward, in which FSDP2 itself
reduces the gradients and splits the weights again. Its hooks on the layers, which would gather and reduce for each
micro-batch, only cast inputs and outputs meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from tp_plugin.errors import TPError


class Gathered:
    """The FSDP2 states in ``model``, if it has any."""

    def __init__(self, model: nn.Module):
        self._model = model

    def states(self) -> list[Any]:
        """In the order of modules; each once."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is None:
            return []
        modules = [module for module in self._model.modules() if isinstance(module, fsdp.FSDPModule)]
        return list(dict.fromkeys(module._get_fsdp_state() for module in modules))

    @contextlib.contextmanager
    def whole(self, learns: bool) -> Iterator[bool]:
        """Inside, the weights are whole; with ``learns`` until the end of the backward. Gives whether FSDP2 splits any.

        Raises:
            TPError: layers are split, and the model is not, so nothing of FSDP2 would see the backward.
        """
        states = self.states()
        if any(state._is_root is None for state in states):
            raise TPError(
                "pipeline stages: fully_shard was called for layers of the model, and not for the model itself; call "
                "fully_shard(model) last"
            )
        groups = self.gather()
        with self.passing():
            yield bool(states)
        if not learns:
            for group in groups:
                if group._reshard_after_forward:
                    group.reshard()

    def gather(self) -> list[Any]:
        """Make the weights whole; in a backward, too: a forward without gradients, or the backward of another forward,
        may have split them since, and FSDP2 reduces the gradients of what is whole at its end. Gives their groups."""
        groups = [group for state in self.states() for group in state._fsdp_param_groups]
        for group, following in zip(groups, [*groups[1:], None], strict=False):  # (without any, nothing follows)
            group.unshard()
            if following is not None:
                following.unshard()  # while this one is copied
            group.wait_for_unshard()
        return groups

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, the hooks of FSDP2 on modules neither gather nor reduce."""
        states = self.states()
        for state in states:
            state.tp_passes = True
        try:
            yield
        finally:
            for state in states:
                state.tp_passes = False
