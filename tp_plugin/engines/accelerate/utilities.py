"""``accelerate.utils.other``: files, and compiled regions."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.engines import saving
from tp_plugin.engines.patching import wrap
from tp_plugin.runtime.runtime import current_mesh


def install(other: Any) -> None:
    """Patch ``accelerate.utils.other``, before anybody takes its functions by name."""
    saving.install_accelerate(other)
    wrap(other, "compile_regions", _compile_regions)


def _compile_regions(original: Any, module: nn.Module, **settings: Any) -> Any:
    """In place where models are cut into stages: a copy's forward would call the layers that are not compiled."""
    mesh = current_mesh()
    if mesh is None or mesh.pp_size == 1:
        return original(module, **settings)
    from accelerate.utils.other import compile_regions_deepspeed

    compile_regions_deepspeed(module, **settings)
    return module
