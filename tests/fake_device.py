"""A device that is none: CPU tensors that count as a device's, and a list of what would make the host wait for it.

What is computed of a device's tensor lies on the device. A copy to the host that does not block is late: it holds
nonsense until an event that was recorded behind it has been waited for.
"""

from __future__ import annotations

import contextlib
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tp_plugin

METHODS = {
    "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "numpy", "is_nonzero", "equal",
    "argwhere", "masked_select", "unique", "allclose",
}  # fmt: skip
OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
TORCH, PLUGIN = (str(Path(module.__file__ or "").parent) for module in (torch, tp_plugin))


def waits_of_ours() -> str | None:
    """The plugin's line that calls now, if torch was called by the plugin."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__, "<")):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(PLUGIN):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class FakeDevice:
    """Attributes:
    syncs: what the plugin's lines did that waits for the device.
    theirs: how many times others did.
    """

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.theirs = 0
        self._storages: set[int] = set()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def claim(self, *tensors: torch.Tensor) -> None:
        """These lie on the device."""
        self._storages.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def holds(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._storages

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        from tp_plugin.mesh import host_copy

        fake = self

        class Event:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

            def record(self, *args: Any) -> None:
                self.copies, fake._copies = fake._copies, []

            def query(self) -> bool:
                self.synchronize()
                return True

            def synchronize(self) -> None:
                for into, source in self.copies:
                    into.copy_(source)

        elsewhere = unittest.mock.patch.object(host_copy, "is_on_host", lambda tensor: not fake.holds(tensor))
        with elsewhere, unittest.mock.patch.object(torch, "Event", Event), _Calls(self), _Operators(self):
            yield

    def note(self, what: str) -> None:
        line = waits_of_ours()
        if line is None:
            self.theirs += 1
        else:
            self.syncs.append(f"{what} at {line}")

    def late_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            late = torch.full_like(tensor, 77)
            self._copies.append((late, tensor.clone()))
        self._storages.discard(late.untyped_storage()._cdata)
        return late


class _Calls(TorchFunctionMode):
    """What Python calls: these never come to an operator where the tensor lies on the host in truth."""

    def __init__(self, fake: FakeDevice):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and name in METHODS | {"to"} and self.fake.holds(first):
            # a device that was asked of a tensor is the fake one
            to_host = name == "to" and any(isinstance(v, str) and v == "cpu" for v in (*args[1:], *kwargs.values()))
            if to_host and kwargs.get("non_blocking"):
                return self.fake.late_copy(first)
            if name in METHODS or to_host:
                self.fake.note(name)
        found = func(*args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device) and isinstance(found, torch.Tensor):
            self.fake.claim(found)  # made where another tensor lies
        return found


class _Operators(TorchDispatchMode):
    """What torch itself calls, autograd among it; passes on where tensors lie."""

    def __init__(self, fake: FakeDevice):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(self.fake.holds(tensor) for tensor in held)
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_", "index_put") and any(
            tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if isinstance(tensor, torch.Tensor)
        )
        if on_device and (name in OPERATORS or masked):
            self.fake.note(name)
        found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                with torch._C.DisableTorchFunction():
                    place = tensor.untyped_storage()._cdata
                (self.fake._storages.add if on_device else self.fake._storages.discard)(place)
        if on_device and name.endswith("_"):
            self.fake.claim(*held)
        return found
