"""What ms-swift asks torch.distributed and the environment, of a TP group; tests/blackbox/test_factories.py runs it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from workers import run


def loaders_case() -> dict[str, Any]:
    """The lines of swift/dataloader (4.6) that count."""
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import patching, swift
    from tp_plugin.runtime.start import start, stop

    stop()
    start(RunConfig(2))
    module: Any = SimpleNamespace(dist=torch.distributed)
    with patching.taken_back():
        swift.install_loader(module)
        dist = module.dist
        assert dist.is_initialized()
        shard = (dist.get_rank() // 1, dist.get_world_size() // 1)  # `tp_size` is 1 unless DeepSpeed's AutoTP is on
        group = dist.group.WORLD
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        outputs: list[Any] = [None]
        source = dist.get_global_rank(group, 0)
        dist.scatter_object_list(
            outputs, [f"batch {at}" for at in range(size)] if rank == 0 else None, source, group=group
        )
    assert module.dist is torch.distributed
    return {"shard": shard, "given": outputs[0]}


def test_a_group_takes_one_share_of_the_samples() -> None:
    for rank, found in enumerate(run(4, loaders_case)):
        assert found == {"shard": (rank // 2, 2), "given": f"batch {rank // 2}"}


def test_steps_are_those_of_dp_processes(monkeypatch: Any) -> None:
    from tp_plugin.engines import patching, swift

    def get_dist_setting() -> tuple[int, ...]:
        return tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))

    for name, value in {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    module: Any = SimpleNamespace(get_dist_setting=get_dist_setting)
    with patching.taken_back():
        swift.install_sizes(module)
        for size, processes in (("2", 2), ("4", 1), ("1", 4)):
            monkeypatch.setenv("TP_PLUGIN_TP_SIZE", size)
            assert module.get_dist_setting() == (3, 3, processes, 4)
