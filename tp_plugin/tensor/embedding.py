"""Token embeddings whose rows are split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.mesh.groups import Group
from tp_plugin.tensor import regions


class VocabularyRows:
    """Hooks of an embedding that holds the rows ``[start, stop)`` of the vocabulary."""

    def __init__(self, start: int, stop: int, padding: int | None, group: Group):
        self.group = group
        self.start, self.stop, self.whole_padding = start, stop, padding
        inside = padding is not None and start <= padding < stop
        self.padding = padding - start if padding is not None and inside else None
        self._elsewhere: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Token ids → local rows; ids of other ranks' rows read row 0 and are blanked afterwards."""
        module.padding_idx = self.padding  # type: ignore[assignment]
        return (self.local(args[0]), *args[1:])

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' rows, of which one is not blank: the embeddings of all ids."""
        module.padding_idx = self.whole_padding  # type: ignore[assignment]
        return self.summed(output)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Numbers of this rank's rows."""
        elsewhere = (ids < self.start) | (ids >= self.stop)
        self._elsewhere.append(elsewhere)
        return (ids - self.start).masked_fill(elsewhere, 0)

    def summed(self, output: torch.Tensor) -> torch.Tensor:
        """The rows of the ids last given to :meth:`local`, from those of the ranks."""
        blank = output.masked_fill(self._elsewhere.pop().unsqueeze(-1), 0)
        return regions.reduce_from_tp(blank, self.group)


class AdaptedRows:
    """The look-up in a LoRA adapter of an embedding (PEFT's ``Embedding._embed``), whose rows are split likewise.

    One all-reduce of r numbers per token in the forward.
    """

    def __init__(self, rows: VocabularyRows):
        self.rows = rows

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor, **hooks: Any) -> torch.Tensor:
        return self.rows.summed(F.embedding(self.rows.local(ids), weight, padding_idx=self.rows.padding))
