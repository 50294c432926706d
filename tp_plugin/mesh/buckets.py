"""Many small tensors in one collective: flat buckets, one per group, dtype and device."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tp_plugin.mesh.groups import Group, Pending


class Bucket:
    """Tensors, or views of some, that one collective changes in place; equal on the group's ranks in number and size.

    Attributes:
        group: its ranks.
        views: the tensors.
    """

    def __init__(self, group: Group, views: list[torch.Tensor]):
        self.group, self.views = group, views
        self._pending: Pending | None = None

    def start_sum(self) -> Bucket:
        """Begin to sum over the ranks; the tensors must not be touched before :meth:`finish`."""
        self._pending = self.group.start_all_reduce(self._flat())
        return self

    def finish(self) -> None:
        """Wait for the sum, and write it."""
        assert self._pending is not None
        self._write(self._pending.wait())

    def broadcast(self, near: float) -> None:
        """Give all ranks the first one's, but leave a rank its own where they are no rounding of these.

        Args:
            near: the largest norm of the difference, relative to the first rank's.
        """
        mine = self._flat()
        theirs = self.group.broadcast(mine.clone())
        if self.group.rank:
            apart, size = (torch.linalg.vector_norm(t, dtype=_wide(t)) for t in (theirs - mine, theirs))
            self._write(torch.where(apart <= near * size, theirs, mine))

    def _flat(self) -> torch.Tensor:
        if len(self.views) == 1 and self.views[0].is_contiguous():
            return self.views[0].view(-1)
        return torch.cat([view.reshape(-1) for view in self.views])

    def _write(self, flat: torch.Tensor) -> None:
        if flat.data_ptr() == self.views[0].data_ptr():
            return  # one tensor, in place
        parts = flat.split([view.numel() for view in self.views])
        torch._foreach_copy_(self.views, [part.view(view.shape) for part, view in zip(parts, self.views, strict=True)])


def buckets(shared: Iterable[tuple[Group, torch.Tensor]]) -> list[Bucket]:
    """Tensors and the groups that share them, in buckets; in the order in which each group, dtype and device occurs."""
    found: dict[tuple[int, torch.dtype, torch.device], Bucket] = {}
    for group, view in shared:
        key = id(group), view.dtype, view.device
        found.setdefault(key, Bucket(group, [])).views.append(view)
    return list(found.values())


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
