"""Which machine each rank is on, how ranks on others reach it, and which rank of the world speaks first."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tp_plugin.mesh.groups import Group

PLACE = "tp_plugin/place"


@dataclass(frozen=True)
class Machine:
    """A host, or a container with a network of its own on it: what traffic between two of them has to cross."""

    name: str
    network: str

    @staticmethod
    def here() -> Machine:
        """The machine of this process."""
        try:  # names are not unique: containers and images share them
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            return Machine(socket.gethostname(), f"{boot} {os.stat('/proc/self/ns/net').st_ino}")
        except OSError:
            return Machine(socket.gethostname(), "")


def address(group: Group) -> str:
    """This rank's address as ranks on other machines see it: where it reaches the rendezvous from. Collective.

    On the machine of the rendezvous that may be the loopback; then, where it reaches a rank elsewhere from.
    """
    mine = _from_where(os.environ["MASTER_ADDR"])
    others = [found for found in group.gather_objects(mine) if not found.startswith("127.")]
    return _from_where(others[0]) if mine.startswith("127.") and others else mine


def _from_where(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(os.environ.get("MASTER_PORT", "29500"))))  # no packet is sent
        return str(probe.getsockname()[0])


def tell_place(rank: int, device_type: str) -> None:
    """Say where this rank is, for :func:`places_of_ranks`."""
    device = device_type
    if device_type != "cpu":
        device += f":{torch.accelerator.current_device_index()}"
    dist.distributed_c10d._get_default_store().set(f"{PLACE}/{rank}", f"{Machine.here().name}\n{device}")


def places_of_ranks(world: int) -> list[tuple[str, str]]:
    """Each rank's machine and device; of one that has not told yet, question marks. Waits for nobody."""
    store = dist.distributed_c10d._get_default_store()
    places = []
    for rank in range(world):
        told = store.get(f"{PLACE}/{rank}").decode() if store.check([f"{PLACE}/{rank}"]) else "?\n?"
        machine, _, device = told.partition("\n")
        places.append((machine, device))
    return places


def comes_first(matter: str) -> bool:
    """Whether this rank is the first of the world to ask for ``matter``: it speaks for the others."""
    first: bool = dist.distributed_c10d._get_default_store().add(f"tp_plugin/first/{matter}", 1) == 1
    return first
