"""A rank's part of a full tensor as chunks: what torch's distributed checkpoint (DCP) writes and reads.

A checkpoint in coordinates of the full tensor knows nothing of TP or DP: any tp, any dp and plain FSDP2 load it, and
``accelerate merge-weights`` makes one file of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tp_plugin.mesh.dtensor_utils import held, held_rows
from tp_plugin.policy import ParamLayout


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a full tensor.

    Attributes:
        offsets: where it begins in the full tensor, by dimension.
        sizes: its shape.
        local_offsets: where it begins in the tensor that the rank holds.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]


def chunks(layout: ParamLayout, rank: int, rows: tuple[int, int] | None, owned: bool = False) -> list[Chunk]:
    """What a rank holds of a full tensor, as rectangles.

    Args:
        layout: how the full tensor is split over the TP ranks.
        rank: the TP rank.
        rows: which rows ``[start, stop)`` of dimension 0 of the TP rank's tensor this DP rank holds; None: all.
        owned: only elements that no lower TP rank holds, so that each element is written once.
    """
    local = layout.local_shape(rank)
    if layout.dim is None:
        spans = [(0, 0, local[0] if local else 1)]
    else:
        # cut where replication changes, so that a chunk is owned as a whole or not at all
        spans = [
            (start, layout.to_local(rank, start, stop)[0], stop - start)
            for start, stop, ranks in layout.segments
            if rank in ranks and (rank == ranks[0] or not owned)
        ]
    found = []
    for whole_at, at, length in spans:
        offsets, sizes, local_at = [0] * len(local), list(local), [0] * len(local)
        dim = layout.dim or 0
        if local:
            offsets[dim], sizes[dim], local_at[dim] = whole_at, length, at
            if rows is not None:
                start, stop = max(local_at[0], rows[0]), min(local_at[0] + sizes[0], rows[1])
                offsets[0], sizes[0], local_at[0] = offsets[0] + start - local_at[0], stop - start, start - rows[0]
        if all(size > 0 for size in sizes):
            found.append(Chunk(tuple(offsets), tuple(sizes), tuple(local_at)))
    return found


class DCPShardView(torch.Tensor):
    """A tensor with the shape of the full one, of which this rank holds some chunks, with DCP's protocol for that.

    The protocol is torch's ``torch.distributed._checkpointable._Checkpointable``. ``tp_local`` is the parameter's
    DTensor; DCP reads and writes its memory.
    """

    tp_local: Any
    tp_layout: ParamLayout
    tp_rank: int

    @staticmethod
    def of(local: Any, layout: ParamLayout, rank: int) -> DCPShardView:
        """The view of shape ``layout.shape`` on ``local``, what TP rank ``rank`` holds under ``layout``."""
        view = torch.Tensor._make_wrapper_subclass(DCPShardView, layout.shape, dtype=local.dtype, device=local.device)
        # an alias: the tensor itself looks whole in the script's region, where it may be saved
        view.tp_local, view.tp_layout, view.tp_rank = local.detach(), layout, rank
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return DCPShardView.of(args[0].tp_local, args[0].tp_layout, args[0].tp_rank)
        raise NotImplementedError(
            f"{function} on a tensor of which this rank holds a part; it can only be saved and loaded by "
            "torch.distributed.checkpoint. For full tensors use StateDictOptions(full_state_dict=True)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DCPShardView(shape={tuple(self.shape)}, dtype={self.dtype}, rank={self.tp_rank})"

    def _chunks(self, owned: bool = False) -> list[Chunk]:
        return chunks(self.tp_layout, self.tp_rank, held_rows(self.tp_local), owned)

    def __create_write_items__(self, fqn: str, value: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(held(self.tp_local))
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)), properties, self.shape
                ),
            )
            for chunk in self._chunks(owned=True)
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in self._chunks()]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        for chunk in self._chunks():
            if chunk.offsets == tuple(index.offset):
                view = held(self.tp_local)
                for dim, (start, size) in enumerate(zip(chunk.local_offsets, chunk.sizes, strict=True)):
                    view = view.narrow(dim, start, size)
                return view
        raise ValueError(f"no part of {index.fqn!r} begins at {tuple(index.offset)} on this rank")
