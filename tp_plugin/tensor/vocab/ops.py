"""What a script may do with deferred logits, and what each operation costs.

- Deferred: views that keep the vocabulary whole (views.py), casts and elementwise functions (pointwise.py).
- Some numbers per token: cross-entropy, log-softmax, softmax, sums, entries at labels, argmax, max, topk (sums.py).
- Everything else gathers all columns, once, and goes on with an ordinary tensor.

A script may do any of it on one rank alone: see reading.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from tp_plugin.runtime.current import require
from tp_plugin.tensor.vocab.expr import ALL, Values, digest, pad
from tp_plugin.tensor.vocab.tensor import Logits, blank, elementwise, incoming

Handler = Callable[..., Any]
"""Takes the operation's arguments; NotImplemented means: gather."""

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


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func``, called by the script on at least one deferred tensor."""
    if func in OF_THE_WRAPPER:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if _writes(func) and isinstance(args[0], Logits):
        return func(args[0].change(), *_plain(args[1:]), **_plain(kwargs))
    if any(isinstance(arg, Logits) and arg.storage() is not None for arg in tree_leaves((args, kwargs))):
        args, kwargs = tree_map_only(Logits, _as_changed, (args, kwargs))
        return func(*args, **kwargs)
    handler = HANDLERS.get(func)
    result = NotImplemented if handler is None else handler(*args, **kwargs)
    return func(*_plain(args), **_plain(kwargs)) if result is NotImplemented else result


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func``, called by torch below autograd: the engine adds gradients up, a node of the graph returns its input."""
    with torch.no_grad():
        if func in HANDLERS:
            result = HANDLERS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(Logits, Logits.gathered, (args, kwargs))
        return func(*args, **kwargs)


def _plain(tree: Any) -> Any:
    return tree_map_only(Logits, Logits.plain, tree)


def _as_changed(logits: Logits) -> torch.Tensor:
    return logits if logits.storage() is None else logits.plain()


_INPLACE = {"add", "sub", "mul", "truediv", "div", "pow", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"}


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _INPLACE)
    return name.endswith("_") and name != "requires_grad_"


@handles("detach")
def alias(logits: Logits) -> Logits:
    """The same values outside of the graph."""
    return logits.again(logits.shape_in_storage)


def _add(one: torch.Tensor, other: torch.Tensor) -> Any:
    """The sum of two gradients."""
    if one.shape != other.shape:
        return NotImplemented
    like = next(each for each in (one, other) if isinstance(each, Logits))
    both = (
        each
        if isinstance(each, Logits)
        else Logits.make(like.vocabulary, *incoming(each, like.axis), blank(like), each.device)
        for each in (one, other)
    )
    return elementwise(torch.add, tuple(both), {})


HANDLERS[torch.Tensor.data.__get__] = alias  # type: ignore[attr-defined]
HANDLERS[torch.ops.aten.detach.default] = alias
HANDLERS[torch.ops.aten.alias.default] = alias
HANDLERS[torch.ops.aten.add.Tensor] = _add


def gather(logits: Logits) -> torch.Tensor:
    """All columns (rows, vocabulary): one all-gather if all ranks are here, else from the other ranks' threads."""
    with torch.no_grad():
        expr, tensors = logits.ordered()
        mesh, vocabulary = require().mesh, logits.vocabulary
        columns = [vocabulary.owned(rank) for rank in range(mesh.tp_size)]
        if together("gather", logits):
            first, last = vocabulary.mine
            own = pad(expr.pick(ALL, (first, last), Values(tensors, first)), vocabulary.width)
            parts = [part[:, : b - a] for part, (a, b) in zip(mesh.tp.all_gather(own), columns, strict=True)]
        else:
            parts = []
            for rank, (first, last) in enumerate(columns):
                if first < last:
                    there = {
                        leaf: require().remote_logits.read(rank, leaf, tensor)
                        if leaf.number and rank != mesh.tp.rank
                        else tensor
                        for leaf, tensor in tensors.items()
                    }
                    parts.append(expr.pick(ALL, (first, last), Values(there, first)))
        return torch.cat(parts, -1)


def together(operation: str, logits: Logits, *more: torch.Tensor) -> bool:
    """Whether all ranks are at this operation on the same logits (and ``more``), so that it may communicate."""
    expr, tensors = logits.ordered()
    newest = max((leaf.number for leaf in expr.leaves() if leaf.number), default=None)
    return require().remote_logits.propose(
        f"{operation} {expr.signature(tensors)} {' '.join(digest(each) for each in more)}", newest
    )


def is_vocabulary(logits: Any, dim: Any) -> bool:
    """Whether ``dim`` of deferred ``logits`` is the vocabulary."""
    return isinstance(logits, Logits) and isinstance(dim, int) and dim in (logits.axis, logits.axis - logits.dim())


_PROPERTIES = (
    "shape dtype device layout requires_grad grad_fn is_leaf ndim _version is_cuda is_cpu is_meta is_sparse "
    "is_quantized is_nested is_mkldnn is_xpu is_mps is_ipu is_xla is_vulkan is_sparse_csr is_maia is_mtia grad "
    "output_nr names itemsize nbytes retains_grad _backward_hooks _post_accumulate_grad_hooks _base _cdata _grad "
    "_grad_fn _has_symbolic_sizes_strides _python_dispatch grad_dtype name volatile"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed stride is_contiguous "
    "storage_offset register_hook retain_grad get_device is_inference is_conj is_neg __len__ __hash__ _is_view "
    "dim_order has_names requires_grad_ backward"
)


def _of_the_wrapper() -> set[Any]:
    found = {*functions(_METHODS), torch.autograd.grad, torch.autograd.backward}
    for name in _PROPERTIES.split():
        descriptor: Any = getattr(torch.Tensor, name, None)
        if hasattr(descriptor, "__get__"):
            found.add(descriptor.__get__)
    return found


OF_THE_WRAPPER = _of_the_wrapper()
"""What the wrapper itself answers."""
