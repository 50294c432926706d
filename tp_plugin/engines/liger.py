"""Liger-Kernel: its kernels for RoPE, norms and MLPs are local to a rank; its losses take the whole vocabulary.

The first stay, and the loss is that over the split vocabulary, which needs no whole logits either.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.whole_heads import refusing
from tp_plugin.tensor.forward import WrappedForward

OURS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
"""Of Liger's options: what the loss over the split vocabulary takes the place of."""


def install(monkey_patch: Any) -> None:
    """Patch ``liger_kernel.transformers.monkey_patch``, by which Trainer, its relatives and scripts apply Liger."""
    table = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    applied = {function: _without_loss(function) for function in table.values()}
    for name, function in list(vars(monkey_patch).items()):
        if name.startswith("apply_liger_kernel_to_"):
            patch(monkey_patch, name, applied.get(function) or _without_loss(function))
    patch(
        monkey_patch,
        "MODEL_TYPE_TO_APPLY_LIGER_FN",
        {kind: applied[function] for kind, function in table.items()},
    )
    wrap(monkey_patch, "_bind_method_to_module", _bind_method_to_module)


def install_losses(losses: Any) -> None:
    """Patch ``liger_kernel.chunked_loss``, which scripts and old releases of TRL call with ``lm_head.weight``."""
    for name, value in vars(losses).items():
        if inspect.isclass(value) and name.endswith("Loss"):
            wrap(value, "forward", refusing(f"Liger's {name}", "take the loss of the logits"))


def _without_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    ours = {name: value for name, value in OURS.items() if name in signature.parameters}

    @functools.wraps(function)
    def applying(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments.update(ours)
        return function(*given.args, **given.kwargs)

    return applying


def _bind_method_to_module(original: Any, module: Any, name: str, method: Any) -> None:
    """Liger's forward runs inside of what stands around the module's own, as any patch from before would."""
    wrapped = vars(module).get(name)
    original(module, name, method)
    if isinstance(wrapped, WrappedForward):
        wrapped.own = vars(module)[name]
        setattr(module, name, wrapped)
