"""Randomness in a TP group: equal where the computation is replicated, one process' masks where it is sharded.

The script's own generators are the replicated stream. In a sharded region (from a block's input to its reduction) all
ranks draw the masks of one process from it, and take their parts (whole_masks.py). Where the run asks for that
(``dropout: sharded``), or nobody knows what one process draws, the region runs on a stream of its own, seeded by a hash
of the replicated state, the TP rank and the block. Nothing is remembered, so recomputation under gradient
checkpointing, which restores the replicated state, draws the same masks again. A region that drew nothing leaves the
replicated stream untouched; one that drew from its own advances it by one draw, so that the next region differs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor.compiled_dropout import SeededDropouts
from tp_plugin.tensor.generators import DefaultGenerator, OwnStream, of_accelerator
from tp_plugin.tensor.whole_masks import Cuts, WholeMasks, draws_whole


class ShardedRegion:
    """The stretch of a block between its input and its reduction.

    Args:
        block: the block's path.
        cuts: how the tensors inside are split, of which one process' masks are drawn; None: masks of its own.
    """

    def __init__(self, block: str, tp_rank: int, cuts: Cuts | None = None):
        self.block, self.tp_rank, self.cuts = block, tp_rank, cuts
        key = hashlib.blake2b(f"{block}/{tp_rank}".encode(), digest_size=16).digest()
        self._own = OwnStream(key)
        self._number = torch.tensor(int.from_bytes(key[:7], "little"), device="cpu")
        self._traced: SeededDropouts | None = None
        self._masks: list[WholeMasks] = []

    @property
    def nests(self) -> bool:
        """Whether it may begin inside another one, whose dropouts are split otherwise."""
        return self.cuts is not None and not torch.compiler.is_compiling()

    @property
    def is_open(self) -> bool:
        """Whether one process' masks are drawn now."""
        return bool(self._masks)

    def begin(self, device: torch.device, own: bool = False) -> None:
        """Draw the masks of what is inside from here on; ``own``: not those of one process."""
        if torch.compiler.is_compiling():
            self._traced = SeededDropouts(self._number)
            torch._C._push_on_torch_function_stack(self._traced)
            return
        self.end()  # if an exception left the region open
        if self.cuts is None or own or not draws_whole(device):
            self._own.begin(device)
        else:
            self._push(self.cuts)

    def _push(self, cuts: Cuts | None) -> None:
        self._masks.append(WholeMasks(self.block, cuts, self._own))
        self._masks[-1].begin()

    def end(self) -> None:
        """Back to the replicated stream; does nothing outside the region."""
        if self._traced is not None:
            self._traced = None
            torch._C._pop_torch_function_stack()
        while self._masks:
            self._masks.pop().end()
        self._own.end()

    def pause(self) -> None:
        """Inside the region, what is replicated is drawn for a moment."""
        if self._traced is not None:
            self._traced.paused = True
        if self._masks:
            self._push(None)
        self._own.pause()

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        if self._traced is not None:
            self._traced.paused = False
        if self._masks:
            self._masks.pop().end()
        self._own.resume()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRegion:
        return ShardedRegion(self.block, self.tp_rank, copy.deepcopy(self.cuts, memo))


class RegionCheckpoint:
    """A layer's checkpoint, in which its forward runs in the layer's region, now and when it is recomputed.

    transformers recomputes a layer's forward without its hooks.
    """

    def __init__(self, checkpoint: Any, region: ShardedRegion, device: torch.device):
        self._checkpoint, self._region, self._device = checkpoint, region, device

    @property
    def keywords(self) -> dict[str, Any]:
        """Those of the checkpoint that it is."""
        return getattr(self._checkpoint, "keywords", {})

    def __call__(self, forward: Any, *args: Any) -> Any:
        return self._checkpoint(functools.partial(self._run, forward), *args)

    def _run(self, forward: Any, *args: Any) -> Any:
        self._region.begin(self._device)
        try:
            return forward(*args)
        finally:
            self._region.end()


_OUTSIDE = ("classifier_dropout", "summary_first_dropout", "embd_pdrop")
"""Dropouts that the config of a layer names, but that lie outside of all layers."""


class Dropouts:
    """Whether any dropout in a module is on: a Dropout module, or a probability by its name (``attn_pdrop``).

    Args:
        besides: names that do not count.
    """

    def __init__(self, besides: tuple[str, ...] = ()):
        self.besides = besides
        self._found: list[tuple[Any, str]] | None = None

    def __call__(self, module: nn.Module) -> bool:
        if self._found is None:
            owners = [(path.rpartition(".")[2], owner) for path, owner in module.named_modules()]
            owners += [("", owner.config) for _, owner in owners if hasattr(owner, "config")]
            self._found = [
                (owner, name)
                for last, owner in owners
                for name, value in vars(owner).items()
                if isinstance(value, float | int) and self._counts(last, owner, name)
            ]
        return any([getattr(owner, name) > 0 for owner, name in self._found])

    def _counts(self, last: str, owner: object, name: str) -> bool:
        if name == "p" and "Drop" in type(owner).__name__:
            return last not in self.besides
        return "drop" in name and name not in self.besides and name not in _OUTSIDE


def snapshot() -> dict[str, Any]:
    """The states of torch's (CPU and current accelerator), numpy's and Python's global generators."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    states |= {"numpy": np.random.get_state(), "python": random.getstate()}
    device = of_accelerator()
    if device is not None:
        states["accelerator"] = device.get()
    return states


def restore(states: dict[str, Any]) -> None:
    """Set the generators to what :func:`snapshot` returned, here or on another rank."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "accelerator" in states:
        device = torch.accelerator.current_accelerator()
        assert device is not None, "a rank without the others' accelerator"
        DefaultGenerator(device).set(states["accelerator"])


def fingerprint() -> int:
    """63 bits that tell whether two ranks' generators are in the same state."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8)
    device = of_accelerator()
    if device is not None:
        digest.update(device.get().numpy().tobytes())
    _, keys, *position = np.random.get_state(legacy=True)
    digest.update(np.asarray(keys).tobytes())
    _, words, gauss = random.getstate()
    # a tuple of integers hashes alike in every process, unlike strings and None
    digest.update(repr((position, hash(words), gauss)).encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def synchronize(group: Group) -> None:
    """Give every rank of ``group`` the generator states of its first rank."""
    restore(group.broadcast_object(snapshot() if group.rank == 0 else None))
