"""Dropouts inside a block or beside a sharded linear draw from the stream that their input asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.tensor import rng
from tp_plugin.tensor.block import ParallelBlock
from tp_plugin.tensor.whole_masks import Cuts


class FollowingDropout:
    """Hooks of a dropout inside a block or beside a sharded linear: its random stream is the one its input asks for.

    A column-parallel layer's adapter drops from a replicated input inside the block's sharded stretch; a row-parallel
    layer's drops from this rank's share after that stretch has ended at the base layer's reduction.
    """

    def __init__(self, path: str, kind: str, block: ParallelBlock, cuts: Cuts | None):
        self.kind, self.block = kind, block
        self.own = rng.ShardedRegion(path, block.group.rank, cuts)

    def before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook."""
        if module.training:
            if self.kind == "sharded":
                self.own.begin(args[0].device)
            else:
                self.block.stream.pause()

    def after(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        """Forward hook (always called)."""
        if module.training:
            if self.kind == "sharded":
                self.own.end()
            else:
                self.block.stream.resume()
