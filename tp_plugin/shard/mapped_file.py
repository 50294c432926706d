"""Tensors of a safetensors file as private mappings of its bytes: ordinary tensors that the kernel reads page by page.

``MAP_PRIVATE``: pages are read when somebody looks at them, and copied when somebody writes to them. Which pages were
copied the kernel knows (``/proc/self/pagemap``).
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from tp_plugin.errors import TPError

PAGE = mmap.PAGESIZE
MOST = 20_000
"""Tensors of a checkpoint that are mapped at most: the kernel grants a process 65 530 mappings."""

read_bytes: Counter[str] = Counter()
"""Bytes of checkpoint files that this process copied into memory of its own: by slicing (``sliced``), casting whole
(``cast``) and reading tensors smaller than a page (``small``)."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Which bytes of which file a tensor is: equal on two ranks only if they hold the same."""

    inode: int
    size: int
    modified_ns: int
    offset: int
    nbytes: int
    dtype: str


class File:
    """An open file, closed when the last tensor that lies in it is gone; it may be renamed or removed meanwhile."""

    def __init__(self, path: str | os.PathLike[str]):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    def will_read(self, offset: int, nbytes: int) -> None:
        """Have the kernel fetch what :meth:`read` is about to ask for."""
        os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` from ``offset`` on."""
        while into:
            count = os.preadv(self.descriptor, [into], offset)
            if not count:
                raise OSError(f"a checkpoint file ended before byte {offset + len(into)}: it was changed while in use")
            into, offset = into[count:], offset + count


@dataclass
class Mapping:
    """A tensor's file, and where in it the tensor lies."""

    file: File
    identity: Identity


mappings: dict[int, Mapping] = {}
"""Live mappings, by the address of the tensor in them."""


def open_checkpoint(path: str | os.PathLike[str]) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file, mapped; None where that is not possible (then load it as usual).

    Only the header is read, and tensors smaller than a page.
    """
    if sys.platform != "linux":
        return None
    file = File(path)
    about = os.fstat(file.descriptor)
    length = int.from_bytes(os.pread(file.descriptor, 8, 0), "little")
    if 8 + length > about.st_size:
        raise TPError(
            f"{path} is no whole safetensors file: its header should have {length:,} bytes, the file has "
            f"{about.st_size:,}; copy it again, or load another checkpoint"
        )
    try:
        header: dict[str, Any] = json.loads(os.pread(file.descriptor, length, 8))
        header.pop("__metadata__", None)
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise TPError(
            f"{path} is no safetensors file: its header cannot be read ({error}); load another checkpoint"
        ) from error
    if max(ends, default=8 + length) != about.st_size:
        raise TPError(
            f"{path} is cut short or was written half: its tensors end at byte {max(ends, default=8 + length):,}, the "
            f"file has {about.st_size:,}; copy it again, or load another checkpoint"
        )
    if len(header) > MOST or any(entry["dtype"] not in _DTYPES for entry in header.values()):
        return None
    tensors = {}
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        offset, nbytes = 8 + length + first, last - first
        if offset + nbytes > about.st_size or nbytes != math.prod(shape) * dtype.itemsize:
            return None
        if nbytes < PAGE or offset % dtype.itemsize:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            file.read(bytes_of(tensor), offset)
            read_bytes["small"] += nbytes
        else:
            identity = Identity(about.st_ino, about.st_size, about.st_mtime_ns, offset, nbytes, str(dtype))
            tensor = _map(file, identity).view(dtype).view(shape)
        tensors[name] = tensor
    return tensors


_libc: Any = ctypes.CDLL(None, use_errno=True)
_FAILED = ctypes.c_void_p(-1).value
if sys.platform == "linux":
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(file: File, identity: Identity) -> torch.Tensor:
    """The bytes of a tensor; each has a mapping of its own, which goes with it (Python's own keeps a descriptor)."""
    inside = identity.offset % PAGE
    size = inside + identity.nbytes
    start = _allocate(
        size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.descriptor, identity.offset - inside
    )
    memory = (ctypes.c_uint8 * identity.nbytes).from_address(start + inside)
    weakref.finalize(memory, _unmap, start, size, start + inside).atexit = False
    mappings[start + inside] = Mapping(file, identity)
    return torch.frombuffer(memory, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


def inaccessible(nbytes: int) -> torch.Tensor:
    """Bytes with an address and no memory: the kernel stops anything that reads or writes them."""
    nbytes = max(nbytes, 1)
    start = _allocate(nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    memory = (ctypes.c_uint8 * nbytes).from_address(start)
    weakref.finalize(memory, _unmap, start, nbytes, None).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def _allocate(size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    start: int = _libc.mmap(None, size, protection, flags, descriptor, offset)
    if start == _FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return start


def _unmap(start: int, size: int, key: int | None) -> None:
    if key is not None:
        mappings.pop(key, None)
    _libc.munmap(start, size)


def mapping_of(tensor: torch.Tensor) -> Mapping | None:
    """The mapping that ``tensor`` is the whole of, written to or not."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or not mappings:
        return None
    if hasattr(tensor, "ds_id") or tensor.layout != torch.strided:
        return None
    mapping = mappings.get(tensor.data_ptr())
    if mapping is None or tensor.nbytes != mapping.identity.nbytes or not tensor.is_contiguous():
        return None
    return mapping if str(tensor.dtype) == mapping.identity.dtype else None


def is_untouched(address: int, nbytes: int) -> bool:
    """Whether every page still is the file's: the kernel knows which ones were copied because of a write."""
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            raw = pagemap.read(8 * (last - first + 1))
    except OSError:
        return False
    if len(raw) != 8 * (last - first + 1):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes are only read
        pages = torch.frombuffer(raw, dtype=torch.int64)
    # bits 63 and 62: in memory, in swap; bit 61: a page of the file
    return not bool((((pages >> 62) & 3 != 0) & ((pages >> 61) & 1 == 0)).any())


def pages_read(tensor: torch.Tensor) -> int:
    """How many pages of a mapped tensor the kernel has mapped because something in this process looked at one."""
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(8 * first)
        pages = torch.frombuffer(bytearray(pagemap.read(8 * (last - first + 1))), dtype=torch.int64)
    return int((pages < 0).sum())
