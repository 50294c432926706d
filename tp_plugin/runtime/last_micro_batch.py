"""What the ranks of a unit have yet to compare of the last micro-batch, when they meet next: inputs, and the loss.

To compare a tensor of a device at once, the host would wait until the device has nothing left to do. So it is copied
behind that work, and the ranks compare it one micro-batch later: wherever they meet, at a save, at the end.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from tp_plugin.errors import DivergenceError
from tp_plugin.mesh.host_copy import HostCopy
from tp_plugin.mesh.roles import Mesh
from tp_plugin.runtime.digests import Digest, LateDigest, difference

SAME = 1e-6
"""Relative difference up to which losses are one number. Equal weights give equal bits, so this is lenient."""

ROUNDED = 1e-4
"""The same where rounding has drifted into the replicated weights: kernels that add in any order, for months."""

SMALL = 1e-2
"""Losses smaller than this are compared as if they were of this size: they may be differences of larger numbers."""

OTHER_BATCHES = (
    "Ranks of a TP group are one process and must see one batch: pass the loader through accelerator.prepare, or shard "
    "the data by accelerator.process_index / num_processes instead of RANK or LOCAL_RANK"
)

Words = Sequence[int]
"""A checksum of the inputs, and the bits of the loss (NaN: none): what ranks send each other."""

WORDS = 2


Known = tuple[dict[str, Digest], float]
"""The same in full: digests by name, and the loss."""


class OtherMicroBatchError(DivergenceError):
    """The ranks of a TP group have computed on different batches, or called backward on different losses."""


class LastMicroBatch:
    """Holds what is not compared yet.

    Attributes:
        backwards: how many have begun.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._where = ""
        self._inputs: Mapping[str, LateDigest] = {}
        self._loss: HostCopy | None = None
        self._watched = True
        self.backwards = 0

    def begins(self, where: str, inputs: Mapping[str, LateDigest], watched: bool) -> None:
        """A forward of all ranks begins.

        Args:
            where: in words.
            inputs: those that are still to be compared.
            watched: whether the loss that comes of it is, too.
        """
        self._where, self._inputs, self._watched = where, inputs, watched

    def backward_from(self, tensor: torch.Tensor) -> None:
        """A backward begins at ``tensor``; only a single real number is a loss."""
        is_loss = self._watched and tensor.numel() == 1 and tensor.is_floating_point()
        self._loss = HostCopy(tensor) if is_loss else None
        self.backwards += 1

    def known(self) -> Known:
        """What this rank has to compare; any thread may ask."""
        inputs, loss = self._inputs, self._loss
        found = {name: late.value() for name, late in inputs.items()}
        return found, math.nan if loss is None else float(loss.value())

    def words(self) -> Words:
        """The same in few words, which go with every meeting."""
        inputs, loss = self.known()
        return zlib.crc32(repr(sorted(inputs.items())).encode()) if inputs else 0, bits(loss)

    def compare(self, everyone: Sequence[Words], rounded: Callable[[], bool] | None = None) -> None:
        """Compare what all ranks of the unit sent; collective. Nothing is left to compare then.

        Args:
            everyone: their words, in rank order.
            rounded: see :meth:`judge`.

        Raises:
            OtherMicroBatchError: on every rank.
        """
        inputs: list[dict[str, Digest]] = [{}]
        if len({words[0] for words in everyone}) > 1:
            inputs = self._mesh.unit_cpu.gather_objects(self.known()[0])
        rounding = self._rounding()
        self._inputs, self._loss = {}, None
        self._judge_inputs(inputs)
        self._judge_losses([number(words[1]) for words in everyone], rounding, rounded)

    def judge(self, everyone: Sequence[Known], rounded: Callable[[], bool] | None = None) -> None:
        """Compare what is known of all ranks of the unit.

        Args:
            everyone: what is known, in rank order.
            rounded: whether replicated weights differ over the TP group, but by no more than rounding. Collective; not
                at hand outside of a forward, where it is taken for true.

        Raises:
            OtherMicroBatchError: the ranks had other inputs, or other losses.
        """
        self._judge_inputs([inputs for inputs, _ in everyone])
        self._judge_losses([loss for _, loss in everyone], self._rounding(), rounded)

    def _judge_inputs(self, everyone: list[dict[str, Digest]]) -> None:
        found = difference(self._mesh.unit.ranks, everyone)
        if found is not None:
            raise OtherMicroBatchError(
                f"{self._where}: the ranks have computed on different batches; {found[0]!r} differed ({found[1]}). "
                f"{OTHER_BATCHES}"
            )

    def _judge_losses(self, losses: list[float], rounding: float, rounded: Callable[[], bool] | None) -> None:
        if not all(map(math.isfinite, losses)):
            return
        apart = (max(losses) - min(losses)) / max(SMALL, *map(abs, losses))
        if apart <= SAME or (apart <= max(ROUNDED, 2 * rounding) and (rounded is None or rounded())):
            return
        seen = ", ".join(f"rank {rank}: {loss:.9g}" for rank, loss in zip(self._mesh.unit.ranks, losses, strict=True))
        raise OtherMicroBatchError(
            f"the ranks of a TP group called backward() on different losses ({seen}), which must be one number. "
            "Something in the loss is drawn or looked up by each rank for itself, or comes from weights inside of a "
            "forward, where a rank has its shard (a penalty that a module of the model computes). Compute penalties in "
            "the script, where weights look whole, and use values that accelerator.gather or broadcast has made equal"
        )

    def _rounding(self) -> float:
        """Relative distance of neighbouring numbers in the loss's dtype; of float32 if there is no loss."""
        return torch.finfo(torch.float32 if self._loss is None else self._loss.value().dtype).eps


def bits(number: float) -> int:
    """The bits of a number, for a header."""
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found


def number(bits: int) -> float:
    """The number that has these bits."""
    found: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return found
