"""The Runtime of this process: the only module-level state of the package.

For code that somebody else calls and that therefore cannot be handed it (patched functions of other libraries, torch's
hooks). Everything below the engines gets what it needs when it is made. Imports nothing, so that asking costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_plugin.errors import TPError

if TYPE_CHECKING:
    from tp_plugin.mesh.roles import LocalGroups, Mesh
    from tp_plugin.runtime.runtime import Runtime


class _Slot:
    """What a process has: its Runtime, and the groups that the next one can use again."""

    runtime: Runtime | None = None
    local_groups: LocalGroups | None = None


slot = _Slot()


def current() -> Runtime | None:
    """The Runtime of this process, or None before it is started (:func:`tp_plugin.runtime.runtime.start`)."""
    return slot.runtime


def require() -> Runtime:
    """The Runtime of this process.

    Raises:
        TPError: it has not been started.
    """
    if slot.runtime is None:
        raise TPError("no tensor-parallel run in this process yet; call tp_plugin.parallelize first")
    return slot.runtime


def current_mesh() -> Mesh | None:
    """The groups of this process by role, or None before the Runtime is started."""
    return None if slot.runtime is None else slot.runtime.mesh
