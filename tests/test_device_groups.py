"""What the groups of devices are asked for, under NCCL that is not there."""

from __future__ import annotations

import datetime
import unittest.mock
from typing import Any

import torch.distributed as dist
from workers import TIMEOUT, run


class Nccl:
    class Options:
        def __init__(self, is_high_priority_stream: bool = False):
            self.is_high_priority_stream = is_high_priority_stream
            self._timeout = datetime.timedelta(minutes=10)


def streams_case(backend: str) -> dict[str, Any]:
    from torch.distributed import device_mesh

    from tp_plugin.mesh.roles import WorldGroups

    asked: dict[str, Any] = {}
    new_group = device_mesh.new_group

    def spied(ranks: Any, timeout: Any, backend: str, pg_options: Any, group_desc: str, **given: Any) -> Any:
        options = (pg_options.is_high_priority_stream, pg_options._timeout) if pg_options is not None else None
        asked.setdefault(group_desc, []).append((backend, timeout, options))
        return new_group(ranks=ranks, timeout=timeout, backend="gloo", group_desc=group_desc, **given)

    with (
        unittest.mock.patch.object(device_mesh, "new_group", spied),
        unittest.mock.patch.object(dist, "get_backend", lambda: backend),
        unittest.mock.patch.object(dist, "ProcessGroupNCCL", Nccl, create=True),
    ):
        WorldGroups().devices("cpu", 2)
    return asked


def test_sums_over_tp_have_streams_of_high_priority() -> None:
    """And no other group: what is fetched beside them (FSDP2, ZeRO-3) waits behind no sum."""
    patience = datetime.timedelta(seconds=TIMEOUT)
    for backend in ("nccl", "cpu:gloo,cuda:nccl"):
        for asked in run(4, streams_case, backend):
            assert asked["mesh_tp"] == [(backend, patience, (True, patience))] * 2
            assert asked["mesh_data"] == [(backend, None, None)] * 2


def test_other_backends_are_asked_as_ever() -> None:
    for asked in run(4, streams_case, "gloo"):
        assert asked["mesh_tp"] == asked["mesh_data"] == [("gloo", None, None)] * 2
