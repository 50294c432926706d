"""Whether a wrong index can be told without waiting for the device."""

from __future__ import annotations

import functools

import torch

from tp_plugin.mesh import host_copy


def asserts_by_itself(tensor: torch.Tensor) -> bool:
    """Whether ``torch._assert_async`` fails on its device when it comes to it, as kernels do there for a bad index."""
    return not host_copy.is_on_host(tensor) and has_kernel(tensor.device.type)


@functools.cache
def has_kernel(device_type: str) -> bool:
    """Whether devices of this type have that assertion."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key)
