"""Weights that lie in their safetensors file until they are used: full to look at, read where they are touched.

A tensor of the file's own dtype is a mapping of its bytes (mapped_file.py). So whatever a script does with a model
before ``prepare`` gives what it always gave; if nobody wrote, slicing reads this rank's ranges from the file, and no
other page is ever touched.

A tensor that is to be cast, or to lie on a device, cannot be a mapping. It is a :class:`LazyParameter`, which becomes
an ordinary full Parameter at the first operation that may read it, in its dtype and where it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.policy import ParamLayout
from tp_plugin.shard.mapped_file import Identity, Mapping, bytes_of, inaccessible, is_untouched, mapping_of, read_bytes

PIECE = 1 << 18
"""Bytes of a contiguous piece that is read from the file on its own; shorter ones are cut out of whole rows."""

BLOCK = 1 << 23
"""Bytes of whole rows that are read at a time."""

HOST = torch.device("cpu")


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
    """This rank's part of a parameter (or buffer), in memory of its own where the parameter is; with no layout, all.

    On the way to a device the part alone passes through pinned memory, and goes while the next one is read.
    """
    source = parameter.source if isinstance(parameter, LazyParameter) else parameter.data
    layout = layout or ParamLayout.replicated(source.shape, 1)
    mapping = mapping_of(source)
    if mapping is None or identity(source) is None:
        local = layout.shard(source, rank)
        local = local.clone() if local is source and mapping is not None else local
    else:
        local = _read(source, mapping, layout, rank, parameter.device)
    if mapping is not None:
        read_bytes["sliced"] += sum(b - a for a, b in _ranges(source, layout, rank)) * _rows(source, layout)[0]
    return local.to(parameter.device, non_blocking=True).to(parameter.dtype)


def _rows(source: torch.Tensor, layout: ParamLayout) -> tuple[int, int]:
    """How often the split dimension recurs in memory, and the bytes of it each time; all, once, if nothing is split."""
    if layout.dim is None:
        return 1, source.nbytes
    outer = math.prod(source.shape[: layout.dim])
    return outer, source.nbytes // max(outer, 1)


def _ranges(source: torch.Tensor, layout: ParamLayout, rank: int) -> list[tuple[int, int]]:
    """The bytes of these that ``rank`` holds."""
    if layout.dim is None:
        return [(0, source.nbytes)]
    each = source.stride(layout.dim) * source.itemsize
    return [(a * each, b * each) for a, b in layout.parts[rank]]


def _read(source: torch.Tensor, mapping: Mapping, layout: ParamLayout, rank: int, device: torch.device) -> torch.Tensor:
    """``rank``'s part from the file, in host memory: pinned, if it goes to a device."""
    pinned = device.type != "cpu" and torch.accelerator.is_available()
    local = torch.zeros(layout.local_shape(rank), dtype=source.dtype, device=HOST, pin_memory=pinned)
    (outer, width), ranges = _rows(source, layout), _ranges(source, layout, rank)
    into = local.view(-1).view(torch.uint8).view(outer, -1)
    file, start, at = mapping.file, mapping.identity.offset, 0
    places = []  # in the row of the part, in the whole one, bytes
    for a, b in ranges:
        places.append((at, a, b - a))
        at += b - a
    if min((nbytes for _, _, nbytes in places), default=PIECE) >= PIECE:
        pieces = [(row, *place) for row in range(outer) for place in places]
        for row, _, offset, nbytes in pieces:
            file.will_read(start + row * width + offset, nbytes)
        for row, at, offset, nbytes in pieces:
            file.read(bytes_of(into[row, at : at + nbytes]), start + row * width + offset)
        return local
    file.will_read(start, source.nbytes)
    rows = max(1, BLOCK // width)
    block = torch.empty(min(rows, outer), width, dtype=torch.uint8, device=HOST)
    for row in range(0, outer, rows):
        found = block[: min(rows, outer - row)]
        file.read(bytes_of(found), start + row * width)
        for at, offset, nbytes in places:
            into[row : row + rows, at : at + nbytes] = found[:, offset : offset + nbytes]
    return local


def materialize_(parameter: nn.Parameter, local: torch.Tensor) -> None:
    """Make ``parameter`` (the same object) an ordinary Parameter with the data ``local``."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        parameter.data = local
    if isinstance(parameter, LazyParameter):
        del parameter.source, parameter.place
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def move_(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Have what of ``module`` lies in files be on ``device`` in ``dtype`` once it is read (None: as it is)."""
    for parameter in module.parameters():
        if lies_in_file(parameter) and parameter.grad is None:
            wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
            _move(parameter, device or parameter.device, wanted)


def _move(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
    source = parameter.source if isinstance(parameter, LazyParameter) else parameter.data
    if dtype != parameter.dtype != source.dtype:
        return  # two casts are not one: whoever moves it now reads it
    if (device, dtype) == (HOST, source.dtype):
        materialize_(parameter, source)  # a mapping, as it was loaded
        return
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        parameter.data = _nothing(source.shape, dtype)
    parameter.__class__ = LazyParameter
    parameter.source, parameter.place = source, device  # type: ignore[attr-defined]


def _nothing(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return inaccessible(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


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
    if any(lies_in_file(parameter) for parameter in model.parameters()):
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
    """A Parameter of the whole shape, its final dtype and device, whose data lies in a file.

    Operations on what it is (shape, dtype, device, ``requires_grad``, hooks) leave it as it is. Any other first reads
    all of it: the object then is a plain Parameter, and stays the same object. What goes behind torch's function
    protocol finds inaccessible memory, never wrong numbers.
    """

    source: torch.Tensor
    place: torch.device

    @staticmethod
    def of(source: torch.Tensor, dtype: torch.dtype) -> LazyParameter:
        nothing = _nothing(source.shape, dtype)
        parameter: LazyParameter = torch.Tensor._make_subclass(LazyParameter, nothing, dtype.is_floating_point)
        parameter.source, parameter.place = source, HOST
        return parameter

    def read(self) -> None:
        """Become an ordinary whole Parameter."""
        read_bytes["cast"] += self.source.nbytes
        materialize_(self, read_shard(self, None, 0))

    def on_host(self) -> torch.Tensor:
        """Its values in host memory, for one use."""
        return self.source.to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in ABOUT_DEVICE:
            return ABOUT_DEVICE[function](args[0].place)
        if function in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if _changes_nothing(function, args, kwargs):
            return args[0]
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
    "_base", "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
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
ABOUT |= {torch._has_compatible_shallow_copy_type}


def _is_kind(kind: str) -> Callable[[torch.device], bool]:
    return lambda place: place.type == kind


_KINDS = ("cpu", "cuda", "xpu", "mps", "xla", "vulkan", "ipu", "maia", "mtia", "meta")
ABOUT_DEVICE: dict[Any, Callable[[torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda place: place,
    torch.Tensor.get_device: lambda place: -1 if place.type == "cpu" else place.index,
    **{
        getattr(torch.Tensor, f"is_{kind}").__get__: _is_kind(kind)
        for kind in _KINDS
        if hasattr(torch.Tensor, f"is_{kind}")
    },
}
"""Functions that say where a tensor is."""


def _changes_nothing(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is what ``nn.Module.to`` does to a parameter that is there already."""
    if function is torch.Tensor.to and not kwargs.get("copy"):
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
        lazy = args[0]
        return device in (None, lazy.device) and dtype in (None, lazy.dtype) and memory_format is None
    return function == torch.Tensor.data.__set__ and args[0] is args[1]  # type: ignore[attr-defined]


def _lazy_in(value: Any) -> Iterator[LazyParameter]:
    if isinstance(value, LazyParameter):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _lazy_in(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _lazy_in(inner)
