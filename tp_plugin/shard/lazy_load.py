"""Weights that lie in their safetensors file until they are used: full to look at, read where they are touched.

A tensor of the file's own dtype is a mapping of its bytes (mapped_file.py). So whatever a script does with a model
before ``prepare`` gives what it always gave; if nobody wrote, slicing reads this rank's ranges from the file, and no
other page is ever touched.

A tensor that is to be cast cannot lie in the file in its new dtype. It is a :class:`LazyParameter`, which becomes an
ordinary full Parameter at the first operation that may read it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.policy import ParamLayout
from tp_plugin.shard.mapped_file import Identity, bytes_of, inaccessible, is_untouched, mapping_of, read_bytes

PIECE = 512
"""Bytes of a contiguous piece that is read from the file on its own; shorter ones are copied from the mapping."""


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a whole tensor of a file, written to or not."""
    return mapping_of(tensor) is not None


def lies_in_file(parameter: torch.Tensor) -> bool:
    """Whether nobody has read (or needed to copy) ``parameter`` out of its file yet."""
    return isinstance(parameter, LazyParameter) or is_mapped(parameter)


def identity(tensor: torch.Tensor) -> Identity | None:
    """What ``tensor`` is in its file; None if it lies elsewhere or was written to, by whatever way."""
    if isinstance(tensor, LazyParameter):
        source = identity(tensor.source)
        return source and Identity(**{**vars(source), "dtype": f"{source.dtype} as {tensor.dtype}"})
    mapping = mapping_of(tensor)
    if mapping is None or not is_untouched(tensor.data_ptr(), mapping.identity.nbytes):
        return None
    return mapping.identity


def read_shard(parameter: torch.Tensor, layout: ParamLayout | None, rank: int) -> torch.Tensor:
    """This rank's part of a parameter (or buffer), in memory of its own; with no layout, all of it."""
    source = parameter.source if isinstance(parameter, LazyParameter) else parameter.data
    layout = layout or ParamLayout.replicated(source.shape, 1)
    mapping = mapping_of(source)
    if mapping is None:
        return layout.shard(source, rank).to(parameter.dtype)
    if identity(source) is None or min((n for _, _, n in _pieces(source, layout, rank)), default=PIECE) < PIECE:
        local = layout.shard(source, rank)
        local = local.clone() if local is source else local
    else:
        local = torch.zeros(layout.local_shape(rank), dtype=source.dtype, device="cpu")
        into = bytes_of(local)
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
