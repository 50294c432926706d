"""Token embeddings whose rows are split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor import regions
from tp_plugin.tensor.device_asserts import asserts_by_itself
from tp_plugin.tensor.forward import Forward, WrappedForward


class VocabularyRows:
    """What an embedding needs that holds the rows ``[start, stop)`` of a vocabulary of ``size`` entries.

    Args:
        size: entries of the whole vocabulary, the ids that one process accepts.
        padding_idx: of the whole embedding.
        group: the TP group.
    """

    def __init__(self, size: int, start: int, stop: int, padding_idx: int | None, group: Group):
        self.size, self.start, self.stop, self.group = size, start, stop, group
        self.padding_idx = padding_idx
        owned = padding_idx is not None and start <= padding_idx < stop
        self.local_padding_idx = padding_idx - start if padding_idx is not None and owned else None
        self._elsewhere: list[torch.Tensor] = []

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape → numbers of this rank's rows.

        Raises:
            IndexError: an id is outside the vocabulary; all ranks see the same ids, so all of them raise. On GPUs and
                in compiled graphs it is an assertion on the device, as in plain torch: nothing waits for the device.
        """
        valid = ((ids >= 0) & (ids < self.size)).all()
        if torch.compiler.is_compiling() or asserts_by_itself(ids):
            torch._assert_async(valid, "index out of range in self")
        elif not valid:
            raise IndexError("index out of range in self")
        elsewhere = (ids < self.start) | (ids >= self.stop)
        self._elsewhere.append(elsewhere)
        return (ids - self.start).masked_fill(elsewhere, 0)

    def summed(self, output: torch.Tensor) -> torch.Tensor:
        """The embeddings of the ids last given to :meth:`local`, from this rank's rows ``output`` (…, width)."""
        rows = output.masked_fill(self._elsewhere.pop().unsqueeze(-1), 0)
        return regions.reduce_from_tp(rows, self.group, fresh=True)


class ParallelEmbeddingForward(WrappedForward):
    """The forward of an embedding: token ids → this rank's rows, the module's own forward, the sum over the ranks.

    Args:
        rows: which rows those are.
    """

    def __init__(self, module: nn.Module, own: Forward, rows: VocabularyRows):
        super().__init__(module, own)
        self.rows = rows

    def run(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Ids of any shape → their embeddings (…, width). Ids of other ranks' rows read row 0, which is zeroed."""
        module: Any = self.module
        local = self.rows.local(ids)
        module.padding_idx = self.rows.local_padding_idx
        try:
            output = self.own(local, *args, **kwargs)
        finally:
            module.padding_idx = self.rows.padding_idx
        return self.rows.summed(output)


class AdaptedRows:
    """The look-up in a LoRA adapter of an embedding (PEFT's ``Embedding._embed``), whose rows are split likewise.

    One all-reduce of r numbers per token in the forward.
    """

    def __init__(self, rows: VocabularyRows):
        self.rows = rows

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor, **hooks: Any) -> torch.Tensor:
        return self.rows.summed(F.embedding(self.rows.local(ids), weight, padding_idx=self.rows.local_padding_idx))
