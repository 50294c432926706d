"""What a script reads and writes of what ZeRO keeps looks whole, too: gathered weights, fp32 copies, gradients.

DeepSpeed undoes what it partitioned over the data group; what is left is the shard of a TP rank, which looks whole.
"""

from __future__ import annotations

from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.engines.torch_utils import in_step
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
    """Patch ``GatheredParameters``: what it has gathered looks whole."""
    for name in ("__enter__", "__exit__"):
        wrap(partition_parameters.GatheredParameters, name, in_step)


def install_offload(parameter_offload: Any) -> None:
    """Patch ``deepspeed.runtime.zero.parameter_offload``, whose hooks run around forwards of the script's."""
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        wrap(parameter_offload.DeepSpeedZeRoOffload, name, in_step)
    wrap(parameter_offload, "register_external_parameter", _external)


def is_gathered(parameter: Any) -> bool:
    """Whether ZeRO-3 has gathered it: in ``GatheredParameters``, for a forward, or for good as it is small."""
    return str(parameter.ds_status.name) == "AVAILABLE"


def _external(original: Any, module: Any, parameter: Any) -> None:
    """A forward reads a weight of another module, which is gathered; the script's own lines see it whole."""
    original(module, parameter)
    runtime = current()
    if runtime is not None and runtime.region.is_script:
        with runtime.region.step():
            parameter.all_gather()


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
