"""Weights that lie in their safetensors file until they are used: whole to look at, read where they are touched.

A tensor of the file's own dtype is a private mapping of its bytes (``MAP_PRIVATE``): an ordinary tensor of the whole
shape, whose pages the kernel reads when somebody looks at them and copies when somebody writes to them. So whatever a
script does with a model before ``prepare`` gives what it always gave. If nobody wrote, which the kernel knows, slicing
reads this rank's ranges from the file, and no other page is ever touched.

A tensor that is to be cast cannot lie in the file in its new dtype. It is a :class:`LazyParameter`, which becomes an
ordinary whole Parameter at the first operation that may read it.
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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout

PAGE = mmap.PAGESIZE
MOST = 20_000
"""Tensors of a checkpoint that are mapped at most: the kernel grants a process 65 530 mappings."""

PIECE = 512
"""Bytes of a contiguous piece that is read from the file on its own; shorter ones are copied from the mapping."""

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


class _File:
    """An open file, closed when the last tensor that lies in it is gone; it may be renamed or removed meanwhile."""

    def __init__(self, path: str | os.PathLike[str]):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` from ``offset`` on."""
        while into:
            count = os.preadv(self.descriptor, [into], offset)
            if not count:
                raise OSError(f"a checkpoint file ended before byte {offset + len(into)}: it was changed while in use")
            into, offset = into[count:], offset + count


@dataclass
class _Mapping:
    file: _File
    identity: Identity


_mappings: dict[int, _Mapping] = {}
"""Live mappings, by the address of the tensor in them."""


def open_checkpoint(path: str | os.PathLike[str]) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file, mapped; None where that is not possible (then load it as usual).

    Only the header is read, and tensors smaller than a page.
    """
    if sys.platform != "linux":
        return None
    file = _File(path)
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
            tensor = torch.empty(shape, dtype=dtype)
            file.read(_bytes(tensor), offset)
            read_bytes["small"] += nbytes
        else:
            identity = Identity(about.st_ino, about.st_size, about.st_mtime_ns, offset, nbytes, str(dtype))
            tensor = _map(file, identity).view(dtype).view(shape)
        tensors[name] = tensor
    return tensors


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a whole tensor of a file, written to or not."""
    return _mapping_of(tensor) is not None


def lies_in_file(parameter: torch.Tensor) -> bool:
    """Whether nobody has read (or needed to copy) ``parameter`` out of its file yet."""
    return isinstance(parameter, LazyParameter) or is_mapped(parameter)


def identity(tensor: torch.Tensor) -> Identity | None:
    """What ``tensor`` is in its file; None if it lies elsewhere or was written to, by whatever way."""
    if isinstance(tensor, LazyParameter):
        source = identity(tensor.source)
        return source and Identity(**{**vars(source), "dtype": f"{source.dtype} as {tensor.dtype}"})
    mapping = _mapping_of(tensor)
    if mapping is None or not _is_untouched(tensor.data_ptr(), mapping.identity.nbytes):
        return None
    return mapping.identity


def read_shard(parameter: torch.Tensor, layout: ParamLayout | None, rank: int) -> torch.Tensor:
    """This rank's part of a parameter (or buffer), in memory of its own; with no layout, all of it."""
    source = parameter.source if isinstance(parameter, LazyParameter) else parameter.data
    layout = layout or ParamLayout.replicated(source.shape, 1)
    mapping = _mapping_of(source)
    if mapping is None:
        return layout.shard(source, rank).to(parameter.dtype)
    if identity(source) is None or min((n for _, _, n in _pieces(source, layout, rank)), default=PIECE) < PIECE:
        local = layout.shard(source, rank)
        local = local.clone() if local is source else local
    else:
        local = torch.zeros(layout.local_shape(rank), dtype=source.dtype)
        into = _bytes(local)
        for _, offset, nbytes in _pieces(source, layout, rank):
            os.posix_fadvise(mapping.file.descriptor, mapping.identity.offset + offset, nbytes, os.POSIX_FADV_WILLNEED)
        for start, offset, nbytes in _pieces(source, layout, rank):
            mapping.file.read(into[start : start + nbytes], mapping.identity.offset + offset)
    read_bytes["sliced"] += sum(nbytes for _, _, nbytes in _pieces(source, layout, rank))
    return local.to(parameter.dtype)


def _pieces(source: torch.Tensor, layout: ParamLayout, rank: int) -> Iterator[tuple[int, int, int]]:
    """What ``rank`` holds: byte in its local tensor, byte in the whole tensor, number of bytes."""
    if layout.dim is None:
        yield 0, 0, source.nbytes
        return
    row = source.stride(layout.dim) * source.itemsize
    whole, local = source.shape[layout.dim] * row, layout.local_shape(rank)[layout.dim] * row
    ranges = list(zip(layout.parts[rank], layout.local_ranges(rank), strict=True))
    for outer in range(math.prod(source.shape[: layout.dim])):
        for (a, b), (at, _) in ranges:
            yield outer * local + at * row, outer * whole + a * row, (b - a) * row


def materialize_(parameter: nn.Parameter, local: torch.Tensor) -> None:
    """Make ``parameter`` (the same object) an ordinary Parameter with the data ``local``."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        parameter.data = local
    if isinstance(parameter, LazyParameter):
        del parameter.source
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def materialize_all_(model: nn.Module) -> None:
    """Read what of ``model`` still lies in files, whole."""
    for parameter in model.parameters():
        if lies_in_file(parameter):
            materialize_(parameter, read_shard(parameter, None, 0))
    materialize_buffers_(model)


def materialize_buffers_(model: nn.Module) -> None:
    """Copy the buffers of ``model`` that still lie in files."""
    for buffer in model.buffers():
        if is_mapped(buffer):
            buffer.data = read_shard(buffer, None, 0)


def read_at_forward(model: nn.Module) -> None:
    """Have the first forward of ``model`` read what was not: torch.compile cannot trace a reading."""
    if any(isinstance(parameter, LazyParameter) for parameter in model.parameters()):
        hook = torch.compiler.disable(_read_before)  # here, for it imports the compiler
        hook.tp_reads = True
        model.register_forward_pre_hook(hook, prepend=True)


def forget_forward(model: nn.Module) -> None:
    """Take back :func:`read_at_forward`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "tp_reads", False):
                del module._forward_pre_hooks[key]


def _read_before(model: nn.Module, args: object) -> None:
    for parameter in model.parameters():
        if isinstance(parameter, LazyParameter):
            parameter.read()
    forget_forward(model)


class LazyParameter(nn.Parameter):
    """A Parameter of the whole shape and its final dtype, whose data lies in a file in another.

    Operations on what it is (shape, dtype, ``requires_grad``, hooks) leave it as it is. Any other first reads and casts
    all of it: the object then is a plain Parameter, and stays the same object. What goes behind torch's function
    protocol finds inaccessible memory, never wrong numbers.
    """

    source: torch.Tensor

    @staticmethod
    def of(source: torch.Tensor, dtype: torch.dtype) -> LazyParameter:
        nothing = inaccessible(math.prod(source.shape) * dtype.itemsize).view(dtype).view(source.shape)
        parameter: LazyParameter = torch.Tensor._make_subclass(LazyParameter, nothing, dtype.is_floating_point)
        parameter.source = source
        return parameter

    def read(self) -> None:
        """Become an ordinary whole Parameter."""
        read_bytes["cast"] += self.source.nbytes
        materialize_(self, self.source.to(self.dtype))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        for lazy in _lazy_in((args, kwargs)):
            lazy.read()
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.read()
        return self.__deepcopy__(memo)  # as the plain Parameter that it is now

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.read()
        return self.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        self.read()
        return repr(self)


_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "itemsize", "nbytes",
    "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "is_xpu",
    "is_mps", "is_xla", "is_vulkan", "is_ipu", "is_maia", "is_mtia", "names", "name", "output_nr", "retains_grad",
    "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "is_floating_point",
    "is_complex", "is_signed", "is_contiguous", "is_inference", "get_device", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "__len__", "__hash__", "dim_order", "has_names", "is_same_size", "_is_view",
)  # fmt: skip
ABOUT = {
    accessor
    for name in _PROPERTIES
    for way in ("__get__", "__set__")
    if (accessor := getattr(getattr(torch.Tensor, name, None), way, None)) is not None
} | {function for name in _METHODS if (function := getattr(torch.Tensor, name, None)) is not None}
"""Functions that say what a tensor is without reading it."""
ABOUT |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.is_same_size}


def _lazy_in(value: Any) -> Iterator[LazyParameter]:
    if isinstance(value, LazyParameter):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _lazy_in(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _lazy_in(inner)


# --- memory ---------------------------------------------------------------------------------------------------------

_libc: Any = ctypes.CDLL(None, use_errno=True)
_FAILED = ctypes.c_void_p(-1).value
if sys.platform == "linux":
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(file: _File, identity: Identity) -> torch.Tensor:
    """The bytes of a tensor; each has a mapping of its own, which goes with it (Python's own keeps a descriptor)."""
    inside = identity.offset % PAGE
    size = inside + identity.nbytes
    start = _allocate(
        size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.descriptor, identity.offset - inside
    )
    memory = (ctypes.c_uint8 * identity.nbytes).from_address(start + inside)
    weakref.finalize(memory, _unmap, start, size, start + inside).atexit = False
    _mappings[start + inside] = _Mapping(file, identity)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


def inaccessible(nbytes: int) -> torch.Tensor:
    """Bytes with an address and no memory: whoever reads or writes them is stopped by the kernel."""
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
        _mappings.pop(key, None)
    _libc.munmap(start, size)


def _mapping_of(tensor: torch.Tensor) -> _Mapping | None:
    if isinstance(tensor, LazyParameter) or tensor.device.type != "cpu" or not _mappings:
        return None
    if hasattr(tensor, "ds_id") or tensor.layout != torch.strided:
        return None
    mapping = _mappings.get(tensor.data_ptr())
    if mapping is None or tensor.nbytes != mapping.identity.nbytes or not tensor.is_contiguous():
        return None
    return mapping if str(tensor.dtype) == mapping.identity.dtype else None


def _is_untouched(address: int, nbytes: int) -> bool:
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
