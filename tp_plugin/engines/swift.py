"""ms-swift: its loaders and its numbers of processes are those of torch.distributed; here they are of dp processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from tp_plugin.config.resolve import current_config
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.sentence_transformers import ScatteringDistributed
from tp_plugin.runtime.runtime import current_mesh


def install_loader(loader: Any) -> None:
    """Patch ``swift.dataloader.shard`` or ``swift.dataloader.dispatcher``: one share of the samples per TP group."""
    patch(loader, "dist", _Distributed())


def install_sizes(module: Any) -> None:
    """Patch a module that computes batch sizes and steps of ``get_dist_setting``, which reads the environment."""
    wrap(module, "get_dist_setting", _get_dist_setting)


def _get_dist_setting(original: Any) -> tuple[int, int, int, int]:
    """Rank and local rank, which tell one file and one device from another, stay those of the world."""
    rank, local_rank, world_size, local_world_size = original()
    return rank, local_rank, max(world_size // current_config().unit_size, 1), local_world_size


class _Distributed(ScatteringDistributed):
    """``torch.distributed`` of dp processes, whose group swift names: the world."""

    group = SimpleNamespace(WORLD=None)

    @staticmethod
    def get_rank(group: Any = None) -> int:
        mesh = current_mesh()
        return dist.get_rank() if mesh is None else mesh.data.rank

    @staticmethod
    def get_world_size(group: Any = None) -> int:
        mesh = current_mesh()
        return dist.get_world_size() if mesh is None else mesh.dp_size

    @staticmethod
    def get_global_rank(group: Any, rank: int) -> int:
        return rank
