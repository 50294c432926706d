"""Run a function once a module has been imported, also when that import is under way right now.

The autoload hook runs inside ``import torch``, which may itself be inside ``import accelerate``: such a module stands
in ``sys.modules`` half executed, and must not be patched yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import Any

Action = Callable[[Any], None]


def after_import(name: str, action: Action) -> None:
    """Call ``action(module)`` when module ``name`` is complete: now, or at the end of its import."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if isinstance(spec, _Watched):
        spec.tp_actions.append(action)
    elif getattr(spec, "_initializing", False):
        assert spec is not None
        _watch(spec, [action])
    elif module is not None:
        action(module)
    else:
        _finder.awaited.setdefault(name, []).append(action)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def run_by_import(name: str) -> None:
    """Let ``python -m name`` import the module and call its ``main``, as a console script does.

    It would run a second copy of the module as ``__main__``, on which no ``after_import`` acts. ``name`` must be
    awaited by :func:`after_import`.
    """
    _finder.run_by_import.add(name)


class _Finder:
    """First in ``sys.meta_path``: lets the others find an awaited module, and watches its spec."""

    def __init__(self) -> None:
        self.awaited: dict[str, list[Action]] = {}
        self.run_by_import: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.awaited:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None:
            if name in self.run_by_import:
                spec.loader = _RunByImport(spec.loader)  # type: ignore[assignment]
            _watch(spec, self.awaited[name])  # awaited further: who asks may not import it (importlib.util.find_spec)
        return spec


_finder = _Finder()


class _RunByImport:
    """A loader that gives ``runpy`` other code than ``import``, which the module's own loader serves."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)

    def get_code(self, name: str) -> CodeType:
        return compile(f"from {name} import main\nmain()\n", f"<python -m {name}>", "exec")


class _Watched(ModuleSpec):
    """A spec that notices when importlib is through with its module.

    importlib sets ``spec._initializing`` to True before a module's code runs and to False after it
    (``importlib._bootstrap._load_unlocked``).
    """

    tp_actions: list[Action]

    @property
    def _initializing(self) -> bool:
        return True

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        if value:
            return
        actions = self.tp_actions
        del self.tp_actions
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        self._initializing = value
        if self.name in sys.modules:  # it is taken out again if its code raised
            _finder.awaited.pop(self.name, None)
            for action in actions:
                action(sys.modules[self.name])


def _watch(spec: ModuleSpec, actions: list[Action]) -> None:
    vars(spec).pop("_initializing", None)
    spec.__class__ = _Watched
    spec.tp_actions = actions  # type: ignore[attr-defined]
