"""The rooms: imports point down and never in a circle, and objects of other packages are patched in two rooms only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tp_plugin"

FLOORS = (
    ("errors", "__init__"),
    ("policy", "config"),
    ("mesh",),
    ("tensor",),
    ("runtime",),
    ("shard", "checkpoint"),
    ("estimate",),
    ("engines",),
    ("launch", "cli"),
)
"""From below: a room may import itself and rooms on lower floors. (``model_policies`` stand beside ``policy``.)"""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

BESIDE = {("policy", "config"), ("config", "policy"), ("shard", "checkpoint"), ("launch", "cli"), ("cli", "launch")}
"""Rooms on one floor of which one may not import the other; what is left out (checkpoint → shard) neither."""

THIRD_PARTY = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in files()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree: ast.AST, types_too: bool) -> Iterator[str]:
    """Modules of this package that a file imports, at its top or inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types(node) and not types_too:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below in MODULES or node.module in MODULES:
                    yield below if below in MODULES else node.module
        else:
            yield from imported(node, types_too)


def graph(types_too: bool) -> dict[str, set[str]]:
    return {
        module: set(imported(ast.parse(path.read_text(encoding="utf-8")), types_too)) - {module}
        for module, path in MODULES.items()
    }


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} <= set(FLOOR)


def test_imports_point_down() -> None:
    up = [
        f"{module} imports {other}"
        for module, others in graph(types_too=False).items()
        for other in others
        if FLOOR[room_of(other)] > FLOOR[room_of(module)] or (room_of(module), room_of(other)) in BESIDE
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("types_too", [False, True])
def test_no_circles(types_too: bool) -> None:
    """Also none through imports inside of functions, and of those that are for types only."""
    edges = graph(types_too)
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> None:
        if module in trail:
            raise AssertionError("a circle of imports: " + " -> ".join([*trail[trail.index(module) :], module]))
        if module in done:
            return
        trail.append(module)
        for other in sorted(edges[module]):
            visit(other)
        trail.pop()
        done.add(module)

    for module in edges:
        visit(module)


def imported_names(module: str, source: str) -> str:
    """The names that ``module`` imports from ``source``."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == source]
    return " ".join(alias.name for node in froms for alias in node.names)


def patches(tree: ast.AST) -> Iterator[str]:
    """Assignments to attributes of other packages' modules, and calls of the functions that patch."""
    names = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.partition(".")[0] in THIRD_PARTY
    }
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in names:
                yield ast.unparse(target)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("patch", "wrap"):
            yield ast.unparse(node)[:80]


def test_patches_stand_in_engines_and_launch() -> None:
    found = [
        f"{module}: {patch}"
        for module, path in MODULES.items()
        if room_of(module) not in ("engines", "launch")
        for patch in patches(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_no_global_statements() -> None:
    found = [
        f"{module}: {', '.join(node.names)}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Global)
    ]
    assert not found, "\n".join(found)


def test_look_ups_of_the_runtime_stand_where_libraries_call_us() -> None:
    """Everything below the engines is handed what it needs."""
    found = [
        module
        for module in MODULES
        if room_of(module) not in ("engines", "launch", "cli")
        and re.search(r"\b(current|require|current_mesh|slot)\b", imported_names(module, "tp_plugin.runtime.runtime"))
    ]
    assert found == ["tp_plugin.runtime.start"]  # which sets it


def test_files_are_short() -> None:
    long = {module: lines for module, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
