"""Whether a wrong index can be told without waiting for the device."""

from __future__ import annotations

import functools

import torch


@functools.cache
def asserts_by_itself(device_type: str) -> bool:
    """Whether ``torch._assert_async`` fails on the device when it comes to it, as kernels do there for a bad index."""
    if device_type in ("cpu", "cuda"):
        return device_type == "cuda"
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key)
