"""Saving a sharded model: one rank of each TP group writes, one output file at a time, and no file half-written.

The files of one call get their names together, when the last is complete: until then what stood there stands there.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tp_plugin.engines.patching import wrap
from tp_plugin.engines.torch_utils import in_step
from tp_plugin.mesh.dtensor_utils import is_split
from tp_plugin.runtime.runtime import current, current_mesh, require
from tp_plugin.shard import has_lazy, is_sharded, lazy_full_tensors, materialize, models_in


def install(modeling_utils: Any) -> None:
    """Patch ``PreTrainedModel.save_pretrained`` and what it writes files with."""
    wrap(modeling_utils.PreTrainedModel, "save_pretrained", _save_pretrained)
    wrap(modeling_utils, "safe_save_file", _save_file)


def install_accelerate(other: Any) -> None:
    """Patch what ``accelerate.save`` writes files with."""
    wrap(other, "safe_save_file", _save_file)


def install_hub_mixin(hub_mixin: Any) -> None:
    """Patch ``ModelHubMixin``, by which libraries save what is no transformers model (SetFit)."""
    wrap(hub_mixin.ModelHubMixin, "save_pretrained", _save_mixed)


_unnamed: ContextVar[list[tuple[str, str]] | None] = ContextVar("tp_plugin.unnamed", default=None)
"""Complete files of the call in progress: where they are, and their names."""


@contextlib.contextmanager
def all_or_nothing() -> Iterator[None]:
    """Inside, the files of a model get their names at the end; none does if anything is raised."""
    files: list[tuple[str, str]] = []
    token = _unnamed.set(files)
    try:
        yield
        for unfinished, name in files:
            os.replace(unfinished, name)
    finally:
        for unfinished, _ in files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(unfinished)
        _unnamed.reset(token)


def _save_pretrained(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    return in_step(_save_sharded, original, self, *args, **kwargs)


def _save_sharded(original: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_sharded(self):
        return original(self, save_directory, *args, **kwargs)
    record = self.tp_record
    call = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
    if call.arguments.get("state_dict") is None and any(map(is_split, self.parameters())):
        call.arguments["state_dict"] = _joined(self)
    with record.runtime.sessions.together(f"{record.uid} save"):
        if not (record.mesh.is_leader and call.arguments.get("state_dict") != {}):
            return None  # one rank of the TP group writes; the others return when the files are there
        with lazy_full_tensors(), all_or_nothing():
            return original(*call.args, **call.kwargs)


def _joined(model: Any) -> dict[str, Any]:
    """The whole model of what FSDP2 has split as well, on the main process; a call of all ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _save_mixed(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """It deletes and writes a config of its own around what it saves: one rank does, with the others' help."""
    mesh = current_mesh()
    if mesh is None:
        return original(self, *args, **kwargs)
    with require().sessions.together(f"{type(self).__name__}.save_pretrained"):
        return original(self, *args, **kwargs) if mesh.is_leader else None


def save_model(original: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """``Accelerator.save_model``."""
    mesh = current_mesh()
    sharded = mesh is not None and any(is_sharded(root) for _, root in models_in(model))
    if mesh is None or not sharded or self.distributed_type.value in ("DEEPSPEED", "FSDP"):
        return original(self, model, *args, **kwargs)  # which gather on all ranks
    with require().sessions.together("Accelerator.save_model"), require().region.step():
        if not mesh.is_leader:
            return None
        with lazy_full_tensors(), all_or_nothing():
            return original(self, model, *args, **kwargs)


def get_state_dict(original: Any, self: Any, model: Any, unwrap: bool = True) -> Any:
    """``Accelerator.get_state_dict``: a compiled model has its own names, too, without ``_orig_mod``."""
    if unwrap and current_mesh() is not None and self.distributed_type.value != "DEEPSPEED":
        model = self.unwrap_model(model, keep_torch_compile=False)
    return original(self, model, unwrap)


def _save_file(original: Any, tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
    with all_or_nothing() if _unnamed.get() is None else contextlib.nullcontext():
        written = original(materialize(tensors) if has_lazy(tensors) else tensors, nameless(filename), *args, **kwargs)
        if (runtime := current()) is not None:
            runtime.sessions.progressed()
        return written


def nameless(filename: Any) -> str:
    """Where to write what gets the name ``filename`` at the end of :func:`all_or_nothing`."""
    files = _unnamed.get()
    assert files is not None
    unfinished = f"{os.fspath(filename)}.unfinished"
    files.append((unfinished, os.fspath(filename)))
    return unfinished
