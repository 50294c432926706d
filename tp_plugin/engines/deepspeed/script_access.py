"""What a script reads and writes of what ZeRO keeps looks whole, too: gathered weights, fp32 copies, gradients.

DeepSpeed undoes what it partitioned over the data group; what is left is the shard of a TP rank, which looks whole.
"""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.runtime.runtime import current
from tp_plugin.tensor.global_view import GlobalInfo
from tp_plugin.tensor.global_view.attributes import gradient, to_local
from tp_plugin.tensor.param_entry import entry_of

READS = ("safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state")
WRITES = ("safe_set_full_fp32_param", "safe_set_full_grad", "safe_set_full_optimizer_state")


def install_utils(utils: Any) -> None:
    """Patch ``deepspeed.utils``."""
    for name in READS:
        wrap(utils, name, _read)
    for name in WRITES:
        wrap(utils, name, _write)


def install_gathering(partition_parameters: Any) -> None:
    """Patch ``GatheredParameters``."""
    wrap(partition_parameters.GatheredParameters, "__enter__", _enter)
    wrap(partition_parameters.GatheredParameters, "__exit__", _exit)


def _seen(parameter: Any) -> GlobalInfo | None:
    """As what the script sees it; None in a step, and of what this rank has all of."""
    runtime, entry = current(), entry_of(parameter)
    if runtime is None or not runtime.region.is_script or entry is None or entry.seen is None or entry.seen.is_whole:
        return None
    return entry.seen


def _read(original: Any, parameter: Any, *args: Any, **kwargs: Any) -> Any:
    info = _seen(parameter)
    if info is None:
        return original(parameter, *args, **kwargs)
    with info.peers.step():
        found = original(parameter, *args, **kwargs)
    return found if found is None or tuple(found.shape) != info.local_shape else gradient(found, info)


def _write(original: Any, parameter: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    info = _seen(parameter)
    if info is None:
        return original(parameter, value, *args, **kwargs)
    local = to_local(value, info, value)
    with info.peers.step():
        result = original(parameter, local, *args, **kwargs)
    info.peers.written(parameter)
    return result


def _enter(original: Any, self: Any) -> Any:
    runtime = current()
    if runtime is None or not self.enabled or not runtime.region.is_script:
        return original(self)
    with runtime.region.step():
        entered = original(self)
        for parameter in self.params:
            runtime.region.include(parameter)
    return entered


def _exit(original: Any, self: Any, *error: Any) -> Any:
    runtime = current()
    if runtime is None:
        return original(self, *error)
    with runtime.region.step():
        for parameter in self.params if self.enabled else ():
            runtime.region.exempt(parameter)
        return original(self, *error)
