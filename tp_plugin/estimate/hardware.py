"""GPUs by name: dense 16-bit peak, memory, and links, from the vendors' data sheets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tp_plugin.errors import TPError

GIB = 2.0**30


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates per second.

    Attributes:
        peak: dense bf16 floating-point operations.
        memory: bytes.
        bandwidth: bytes from and to its memory.
        link: bytes that it sends to the GPUs of its machine (one direction).
        network: bytes that it sends to other machines (one direction); a usual machine's, no data sheet has it.
        source: where the figures come from.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str


def _gpu(name: str, tflops: float, gb: float, tb_s: float, link: float, network: float, source: str) -> Gpu:
    return Gpu(name, tflops * 1e12, gb * GIB, tb_s * 1e12, link * 1e9, network * 1e9, source)


GPUS = {
    each.name: each
    for each in (
        _gpu("a100-40", 312, 40, 1.555, 300, 25, "NVIDIA A100 data sheet (SXM4 40 GB), NVLink 600 GB/s both ways"),
        _gpu("a100-80", 312, 80, 2.039, 300, 25, "NVIDIA A100 data sheet (SXM4 80 GB), NVLink 600 GB/s both ways"),
        _gpu("h100", 989.4, 80, 3.35, 450, 50, "NVIDIA H100 data sheet (SXM5), NVLink 900 GB/s both ways"),
        _gpu("h200", 989.4, 141, 4.8, 450, 50, "NVIDIA H200 data sheet (SXM), NVLink 900 GB/s both ways"),
        _gpu("b200", 2250, 180, 7.7, 900, 50, "NVIDIA DGX B200 data sheet, per GPU; NVLink 1.8 TB/s both ways"),
        _gpu("l40s", 362, 48, 0.864, 32, 12.5, "NVIDIA L40S data sheet, PCIe 4.0 x16 64 GB/s both ways"),
        _gpu("mi300x", 1307.4, 192, 5.3, 448, 50, "AMD Instinct MI300X data sheet, 7 links of 128 GB/s both ways"),
        _gpu("rtx4090", 165.2, 24, 1.008, 16, 3, "NVIDIA Ada architecture paper (16 bit, fp32 sums); PCIe 4.0, no P2P"),
    )
}
"""The table. ``memory`` is in GiB as the drivers count it."""


def gpu(name: str) -> Gpu:
    """The GPU of that name, or the one that a JSON file describes.

    Raises:
        TPError: no such name, or the file has not all figures.
    """
    path = Path(name)
    if path.suffix == ".json":
        try:
            return Gpu(**{"name": path.stem, "source": str(path), **json.loads(path.read_text(encoding="utf-8"))})
        except (OSError, ValueError, TypeError) as error:
            wanted = "peak, memory, bandwidth, link, network (operations, bytes and bytes per second)"
            raise TPError(f"--gpu {name}: expected a JSON file with {wanted}: {error}") from error
    key = name.lower().replace("_", "-").removeprefix("nvidia-").removeprefix("amd-")
    key = {"a100": "a100-80", "rtx-4090": "rtx4090", "4090": "rtx4090"}.get(key, key)
    if key not in GPUS:
        raise TPError(f"--gpu {name}: unknown; known are {', '.join(GPUS)}, or a .json file with the figures of one")
    return GPUS[key]
