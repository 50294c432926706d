"""Run a function once a module has been imported, also when that import is under way right now.

The autoload hook runs inside ``import torch``, which may itself be inside ``import accelerate``: such a module stands
in ``sys.modules`` half executed, and must not be patched yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

from wrapt import register_post_import_hook


def after_import(name: str, action: Callable[[Any], None]) -> None:
    """Call ``action(module)`` when module ``name`` is complete: now, or at the end of its import."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if getattr(spec, "_initializing", False):
        _watch(spec, name, action)
    else:
        register_post_import_hook(action, name)


def _watch(spec: Any, name: str, action: Callable[[Any], None]) -> None:
    # importlib sets spec._initializing to False when the module's code has run (importlib._bootstrap._load_unlocked)
    class Watched(ModuleSpec):
        @property
        def _initializing(self) -> bool:
            return True

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__class__ = ModuleSpec
            self._initializing = value
            if not value and name in sys.modules:  # it is taken out again if its code raised
                action(sys.modules[name])

    vars(spec).pop("_initializing")
    spec.__class__ = Watched
