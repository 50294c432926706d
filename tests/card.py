"""A card that this machine does not have: what is sent to it stays in host memory, and is counted."""

from __future__ import annotations

import unittest.mock
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CARD = torch.device("cuda", 0)


class Card(TorchDispatchMode):
    """Inside, tensors can be made on, sent to and computed with on ``cuda:0``; they say that they are on the CPU.

    Attributes:
        sent: bytes of the tensors that were made there, one after the other.
        live, peak: bytes of those that are there, and the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.live, self.peak = 0, 0
        self._there: set[int] = set()
        self._stub = unittest.mock.patch.object(torch.cuda, "_lazy_init", lambda: None)

    def __enter__(self) -> Card:
        self._stub.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stub.stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        device = given.get("device")
        comes = device is not None and torch.device(device).type == CARD.type
        if comes:
            given["device"] = torch.device("cpu")
        result = func(*args, **given)
        stays = device is None and any(self._is_there(value) for value in tree_iter((args, given)))
        if comes or stays:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor) and not self._is_there(value):
                    self._note(value.untyped_storage())
        return result

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._there

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._there.add(key)
        self.sent.append(size)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._there.discard(key)
        self.live -= size
