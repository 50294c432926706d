"""The table of functions that deferred logits handle themselves, by what ``__torch_function__`` is given.

The modules of this package that know how to compute a function register it here; what is not here gathers the logits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

Handler = Callable[..., Any]
"""Takes a function's arguments; NotImplemented means: gather the logits and call the function on them."""

HANDLERS: dict[Any, Handler] = {}


def handles(names: str) -> Callable[[Handler], Handler]:
    """Register a handler for functions by their names in torch.Tensor, torch and torch.nn.functional."""

    def register(handler: Handler) -> Handler:
        for func in functions(names):
            HANDLERS[func] = handler
        return handler

    return register


def functions(names: str) -> list[Any]:
    """Everything of these names in torch.Tensor, torch and torch.nn.functional."""
    return [
        getattr(place, name) for name in names.split() for place in (torch.Tensor, torch, F) if hasattr(place, name)
    ]


def note_gather(func: Any) -> None:
    """Say in the log, once for each function, that it gathers the logits."""
    name = getattr(func, "__name__", str(func))
    _log_gather(getattr(func.__self__, "__name__", name) if name == "__get__" else name)


@functools.cache
def _log_gather(name: str) -> None:
    logger.info(
        "%s() on logits of a split vocabulary gathers all columns on every rank; losses, log-probabilities and what "
        "else stays split are listed in tp_plugin.tensor.vocab",
        name,
    )


_PROPERTIES = (
    "shape dtype device layout requires_grad grad_fn is_leaf ndim _version is_cuda is_cpu is_meta is_sparse "
    "is_quantized is_nested is_mkldnn is_xpu is_mps is_ipu is_xla is_vulkan is_sparse_csr is_maia is_mtia grad "
    "output_nr names itemsize nbytes retains_grad _backward_hooks _post_accumulate_grad_hooks _base _cdata _grad "
    "_grad_fn _has_symbolic_sizes_strides _python_dispatch grad_dtype name volatile"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed stride is_contiguous "
    "storage_offset register_hook retain_grad get_device is_inference is_conj is_neg __len__ __hash__ _is_view "
    "dim_order has_names requires_grad_ detach_ backward"
)


def _of_the_wrapper() -> frozenset[Any]:
    found = {*functions(_METHODS), torch.autograd.grad, torch.autograd.backward}
    for name in _PROPERTIES.split():
        descriptor: Any = getattr(torch.Tensor, name, None)
        if hasattr(descriptor, "__get__"):
            found.add(descriptor.__get__)
    return frozenset(found)


OF_THE_WRAPPER = _of_the_wrapper()
"""What is answered without looking at the values: sizes, and the place in autograd's graph."""
