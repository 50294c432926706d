"""Modules in a sharded model whose ``forward`` is the script's own code, and may read weights that are split.

Their lines are the script's region (tensor/global_view/region.py), which costs time: so those are left out that are
seen to use their own parameters and call modules. Libraries' code, and all code inside of a block, computes on shards.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tp_plugin.policy import ParamLayout, Plan

LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "deepspeed", "trl", "sentence_transformers", "liger_kernel"),
    "tp_plugin",
)
"""Of which no line is the script's."""

READERS = {
    *("parameters", "named_parameters", "state_dict", "get_parameter", "_parameters"),
    *("__dict__", "__getattr__", "__getattribute__", "getattr", "vars", "attrgetter"),
}
"""Names by which code gets at parameters without theirs."""


def own_forwards(model: nn.Module, plan: Plan, within: Sequence[str]) -> list[str]:
    """Paths of the modules of ``model`` with such a forward.

    Args:
        within: paths of layers in which a rank has a part of the tokens.
    """
    apart = (*plan.blocks, *plan.embeddings, *plan.heads, *plan.sharded_norms, *within)
    split = {name: layout for name, layout in plan.layouts.items() if layout.is_sharded}
    own = {
        path: module
        for path, module in model.named_modules()
        if not _is_inside(path, apart) and not _is_librarys(_forward(module))
    }
    reads = _Reads(list(own.values()), {id(p) for name, p in model.named_parameters() if name in split}, split)
    return [path for path, module in own.items() if reads.weights_in(module)]


def called_by_them(model: nn.Module, own: Sequence[str], plan: Plan) -> Iterator[str]:
    """Paths of libraries' modules around blocks, directly below those of ``own``: what such a forward may call."""
    around = {path.rpartition(".")[0] for path in plan.blocks}
    around |= {path[:at] for path in around for at, letter in enumerate(path) if letter == "."}
    found: list[str] = []
    for path, module in model.named_modules():
        if path not in around or path in own or isinstance(module, nn.ModuleList) or _is_inside(path, found):
            continue
        if _is_inside(path, own) and _is_librarys(_forward(module)):
            found.append(path)
    yield from found


def _is_inside(path: str, others: Sequence[str]) -> bool:
    return any(not one or f"{path}.".startswith(f"{one}.") for one in others)


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(getattr(module.forward, "__func__", module.forward))


def _is_librarys(function: Any) -> bool:
    name = "__name__" if isinstance(function, ModuleType) else "__module__"
    module: str = getattr(function, name, None) or type(function).__module__
    return module.partition(".")[0] in LIBRARIES


class _Reads:
    """Which functions may read a parameter of which ranks have parts; what cannot be told, may.

    Args:
        modules: with code of the script's; a method is looked for by its name in all of their classes.
        split: the ids of such parameters, and the layouts by their names.
    """

    def __init__(self, modules: Sequence[nn.Module], split: set[int], layouts: Mapping[str, ParamLayout]):
        self._split = split
        self._names = READERS | {name.rpartition(".")[2] for name in layouts}
        self._methods: dict[str, set[Any]] = {}
        for kind in {base for module in modules for base in type(module).__mro__}:
            for name, value in vars(kind).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if isinstance(function, FunctionType) and not _is_librarys(function):
                    self._methods.setdefault(name, set()).add(inspect.unwrap(function))

    def weights_in(self, module: nn.Module) -> bool:
        """Whether the lines of the forward of ``module`` may."""
        held = [value for name, value in vars(module).items() if name not in vars(_EMPTY)]
        if any(id(p) in self._split for p in module._parameters.values()) or any(map(self._holds, held)):
            return True
        if any(isinstance(child, nn.ParameterList | nn.ParameterDict) for child in module.children()):
            return True
        called = [value for value in held if isinstance(value, FunctionType | MethodType)]
        return self._in_functions([_forward(module), *called])

    def _holds(self, value: Any) -> bool:
        if isinstance(value, list | tuple | set):
            return any(map(self._holds, value))
        if isinstance(value, dict):
            return any(map(self._holds, value.values()))
        return id(value) in self._split or _is_helper(value)

    def _in_functions(self, functions: list[Any]) -> bool:
        seen: set[Any] = set()
        while functions:
            function = functions.pop()
            function = inspect.unwrap(getattr(function, "__func__", function))
            if function in seen or _is_librarys(function):
                continue
            seen.add(function)
            if not isinstance(function, FunctionType):
                return True  # an object that is called, something compiled
            names = set(_names_in(function.__code__, self._names))
            cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
            if names & self._names or any(map(self._holds, cells)):
                return True
            known = [function.__globals__[name] for name in names if name in function.__globals__]
            if any(map(self._holds, known)):
                return True
            spaces = [one for one in (*known, *cells) if isinstance(one, ModuleType | type) and not _is_librarys(one)]
            known += [found for space in spaces for name in names if (found := getattr(space, name, None)) is not None]
            functions += [one for one in (*known, *cells) if isinstance(one, FunctionType | MethodType)]
            functions += [method for name in names for method in self._methods.get(name, ())]
        return False


_EMPTY = nn.Module()


def _is_helper(value: Any) -> bool:
    """Whether ``value`` is an object of a class of the script's, whose methods may do anything."""
    plain = FunctionType | MethodType | ModuleType | type | nn.Module | torch.Tensor | PreTrainedConfig | Enum
    kind = type(value).__module__.partition(".")[0]
    return not isinstance(value, plain) and kind not in (*LIBRARIES, *sys.stdlib_module_names)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names_in(code: CodeType, of_parameters: set[str]) -> Iterator[str]:
    """Names of attributes and globals in ``code``, but those of parameters that are asked of ``self`` itself."""
    before: Any = None
    myself = code.co_varnames[0] if code.co_argcount else None
    for step in dis.get_instructions(code):
        if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_SUPER_ATTR")):
            given = before.argval if before is not None and before.opname.startswith("LOAD_FAST") else None
            of_self = myself is not None and (given[-1] if isinstance(given, tuple) else given) == myself
            if not (of_self and step.argval in of_parameters - READERS):
                yield step.argval
        before = step
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner, of_parameters)
