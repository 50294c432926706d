"""A device that is none: CPU tensors that count as a device's, and a list of what would make the host wait for it.

What is computed of a device's tensor lies on the device. A copy to the host that does not block is late: it holds
nonsense until an event that was recorded behind it has been waited for.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import tp_plugin

METHODS = {
    "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "numpy", "is_nonzero", "equal",
    "argwhere", "masked_select", "unique", "allclose", "to",
}  # fmt: skip
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange")
OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
TORCH, PLUGIN = (str(Path(module.__file__ or "").parent) for module in (torch, tp_plugin))


def line_of_ours() -> str | None:
    """The plugin's line that calls now, through functions of torch or not; None if it is another's.

    What torch does in a call that the plugin has wrapped (``original``) is torch's.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((__file__, "<")):
        frame = frame.f_back
    through_torch = False
    while frame is not None:
        file = frame.f_code.co_filename
        is_wrapper = through_torch and file.startswith(PLUGIN) and "original" in frame.f_locals
        if not file.startswith(TORCH) and not is_wrapper:
            return f"{file}:{frame.f_lineno}" if file.startswith(PLUGIN) else None
        through_torch = True
        frame = frame.f_back
    return None


@contextlib.contextmanager
def _as_is() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class FakeDevice:
    """Attributes:
    syncs: what the plugin's lines did that waits for the device.
    theirs: how many times others did.
    """

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.theirs = 0
        self._storages: dict[int, StorageWeakRef] = {}  # while it has one, a storage's address is not used again
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def claim(self, *tensors: torch.Tensor) -> None:
        """These lie on the device."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)

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
                with _as_is():
                    for into, source in self.copies:
                        into.copy_(source)

        with contextlib.ExitStack() as patches:
            for owner, name, replacement in (
                (host_copy, "is_on_host", lambda tensor: not fake.holds(tensor)),
                (torch, "Event", Event),
                *((torch.Tensor, name, _watched(self, name)) for name in METHODS),
                *((torch, name, _placed(self, getattr(torch, name))) for name in FACTORIES),
            ):
                patches.enter_context(unittest.mock.patch.object(owner, name, replacement))
            patches.enter_context(_Operators(self))
            yield

    def note(self, what: str) -> None:
        line = line_of_ours()
        if line is None:
            self.theirs += 1
        else:
            self.syncs.append(f"{what} at {line}")

    def late_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with _as_is():
            late = torch.full_like(tensor, 77)
            self._copies.append((late, tensor.clone()))
        return late


def _watched(fake: FakeDevice, name: str) -> Any:
    """A method of tensors that waits for their device; it may never come to an operator where they lie on the host."""
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # "cpu" is the host, and a device that was asked of another tensor is the fake one
        to_host = name != "to" or "cpu" in [each for each in (*args, *kwargs.values()) if isinstance(each, str)]
        if to_host and fake.holds(self):
            if name == "to" and kwargs.get("non_blocking"):
                return fake.late_copy(self)
            fake.note(name)
        return original(self, *args, **kwargs)

    return method


def _placed(fake: FakeDevice, original: Any) -> Any:
    """A function that makes tensors: on the device if it is told that of another tensor."""

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        by_torch = sys._getframe(1).f_code.co_filename.startswith(TORCH)  # what it sends objects in, for instance
        if isinstance(kwargs.get("device"), torch.device) and not by_torch:
            fake.claim(made)
        return made

    return function


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
        if on_device:
            made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
            self.fake.claim(*made, *(held if name.endswith("_") else ()))
        return found
