"""The table of functions that deferred logits handle themselves, by what ``__torch_function__`` is given.

The modules of this package that know how to compute a function register it here; what is not here gathers the logits.
"""

from __future__ import annotations

import functools
import logging
import types
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


_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed stride is_contiguous "
    "storage_offset register_hook retain_grad get_device is_inference is_conj is_neg __len__ __hash__ _is_view "
    "dim_order has_names requires_grad_ detach_ backward"
)


def _of_the_wrapper() -> frozenset[Any]:
    values = {"data", "T", "mT", "H", "mH", "real", "imag"}
    properties = (value for name, value in vars(torch._C.TensorBase).items() if name not in values)
    getters = [each.__get__ for each in properties if isinstance(each, types.GetSetDescriptorType)]
    return frozenset([*getters, *functions(_METHODS), torch.autograd.grad, torch.autograd.backward])


OF_THE_WRAPPER = _of_the_wrapper()
"""What is answered without looking at the values: sizes, and the place in autograd's graph."""
