"""Where the script's region ends and a step begins: there the parameters change their class, and nothing else does."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tp_plugin.mesh.dtensor_utils import held
from tp_plugin.tensor.global_view.info import GlobalInfo, shown_class
from tp_plugin.tensor.graphs import disable, runs_untraced


class _Row(NamedTuple):
    """A parameter, its class in steps, the class that looks whole, and when it does; None: always."""

    reference: weakref.ref[Any]
    kind: type
    shown: type
    when: Callable[[Any], bool] | None = None

    def show(self, parameter: Any) -> None:
        if self.when is None or self.when(parameter):
            parameter.__class__ = self.shown


def _of(parameter: Any, rows: dict[int, _Row]) -> _Row | None:
    """The row of ``parameter``, not that of a dead one whose number it has."""
    row = rows.get(id(parameter))
    return row if row is not None and row.reference() is parameter else None


class ScriptRegion:
    """Of one process. Forward, backward, optimizer step and the engines' own code enter steps, and leave them.

    Attributes:
        steps: how many steps were entered from the script's region.
        writes: how often the script has written into a parameter or a gradient.
    """

    def __init__(self) -> None:
        self.steps = self.writes = 0
        self._depth = 0
        self._stepping: dict[int, tuple[int, bool]] = {}
        self._kept: dict[int, tuple[Any, torch.Tensor, int]] = {}
        self._parameters: dict[int, _Row] = {}
        self._exempt: dict[int, _Row] = {}

    def add(self, parameter: Any, info: GlobalInfo) -> None:
        """From now on ``parameter`` looks whole in the script's region."""
        known = _of(parameter, self._parameters)
        parameter.tp_global = info
        kind = type(parameter) if known is None else known.kind
        when = None if known is None else known.when
        row = self._parameters[id(parameter)] = _Row(weakref.ref(parameter), kind, shown_class(parameter, kind), when)
        if not self._depth:
            row.show(parameter)

    def show_when(self, parameter: Any, when: Callable[[Any], bool]) -> None:
        """``parameter`` looks whole where a part of the script's region begins with ``when(parameter)``."""
        row = _of(parameter, self._parameters)
        if row is not None:
            self._parameters[id(parameter)] = row._replace(when=when)

    def exempt(self, parameter: Any) -> bool:
        """``parameter``, which is made whole by other means, is what it is until :meth:`include`.

        Returns:
            Whether it looked whole before.
        """
        row = _of(parameter, self._parameters)
        if row is not None:
            parameter.__class__ = row.kind
            self._exempt[id(parameter)] = self._parameters.pop(id(parameter))
        return row is not None

    def include(self, parameter: Any) -> None:
        """``parameter`` looks whole again."""
        row = _of(parameter, self._exempt)
        if row is not None:
            self._parameters[id(parameter)] = self._exempt.pop(id(parameter))
            if not self._depth:
                row.show(parameter)

    def keep(self, tensor: Any, whole: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The whole of ``tensor``, made once and held until the next step: somebody has its address."""
        kept = self._kept.get(id(tensor))
        if kept is None or kept[2] != self.writes:
            kept = self._kept[id(tensor)] = tensor, whole(), self.writes
        return kept[1]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in the memory of a parameter, of a gradient, or of what an optimizer keeps of one."""
        with torch._C.DisableTorchFunctionSubclass():
            mine = held(tensor).untyped_storage()._cdata
            known = [known for row in self._parameters.values() if (known := row.reference()) is not None]
            held_here = (one for each in known for one in (each, each.grad) if one is not None)
            return any(held(one).untyped_storage()._cdata == mine for one in held_here)

    @property
    def is_script(self) -> bool:
        """Whether this process is in the script's region."""
        return not self._depth

    def enter(self) -> None:
        """A step begins, maybe within another."""
        if not self._depth:
            self.steps += 1
            self._kept.clear()
            self._hide()
        self._depth += 1

    def leave(self) -> None:
        """The innermost step ends."""
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._show()

    def enter_optimizer(self, optimizer: object, has_closure: bool) -> None:
        """An optimizer's step begins; a step of its that raised has not told, and is over."""
        if id(optimizer) in self._stepping:
            self._depth = self._stepping.pop(id(optimizer))[0]
        self._stepping[id(optimizer)] = self._depth, has_closure
        self.enter()

    def leave_optimizer(self, optimizer: object) -> None:
        """An optimizer's step ends."""
        if self._stepping.pop(id(optimizer), None) is not None:
            self.leave()

    def enter_forward(self) -> None:
        """A model's forward begins, which is in no optimizer's step that has no closure: such a one has raised."""
        if self._stepping and not any(has_closure for _, has_closure in self._stepping.values()):
            self._depth = min(depth for depth, _ in self._stepping.values())
            self._stepping.clear()
        self.enter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside, parameters are ordinary tensors of this rank's shards."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def script(self) -> Iterator[None]:
        """Inside a step, code of the script's: parameters look whole."""
        depth = self.enter_script()
        try:
            yield
        finally:
            self.leave_script(depth)

    def enter_script(self) -> int:
        """Code of the script's begins, in the middle of a step; gives what :meth:`leave_script` takes."""
        depth, self._depth = self._depth, 0
        if depth:
            self._show()
        return depth

    def leave_script(self, depth: int) -> None:
        """It ends."""
        if depth and not self._depth:
            self._hide()
        self._depth = depth

    def _show(self) -> None:
        gone = False
        for reference, _, shown, when in self._parameters.values():
            parameter = reference()
            if parameter is None:
                gone = True
            elif when is None or when(parameter):
                parameter.__class__ = shown
        if gone:
            self._parameters = {key: row for key, row in self._parameters.items() if row.reference() is not None}

    def _hide(self) -> None:
        for reference, kind, _, _ in self._parameters.values():
            parameter = reference()
            if parameter is not None:
                parameter.__class__ = kind


class DirectCall:
    """Hooks of a part of a model that computes on shards, also where the script calls it without the model."""

    def __init__(self, region: ScriptRegion):
        self.region = region
        self._entered = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> DirectCall:
        return DirectCall(self.region)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if not torch.compiler.is_compiling() and self.region.is_script:
            self.region.enter()
            self._entered += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, always called."""
        if not torch.compiler.is_compiling() and self._entered:
            self._entered -= 1
            self.region.leave()


runs_untraced(DirectCall.enter)
runs_untraced(DirectCall.leave)


class OwnForward:
    """Hooks of a module in a sharded model whose forward is the script's code: its lines see whole parameters."""

    def __init__(self, region: ScriptRegion):
        self.region = region
        self._entered: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnForward:
        return OwnForward(self.region)

    @disable
    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook, behind all others. Never in a graph."""
        self._entered.append(self.region.enter_script())

    @disable
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, before all others, always called."""
        if self._entered:
            self.region.leave_script(self._entered.pop())
