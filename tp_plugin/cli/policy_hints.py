"""What may be wrong in a policy whose sharded model raises an exception or gives other numbers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import TPError
from tp_plugin.policy import Plan
from tp_plugin.runtime.runtime import current


@contextlib.contextmanager
def explain_failures(model: nn.Module, plan: Plan | None, rank: int = 0) -> Iterator[None]:
    """Turn an exception in a forward of ``model`` into a message: the module it came from, and what to write.

    Args:
        plan: how ``model`` is sharded; None: it is whole, and no policy is to blame.
        rank: this rank in the TP group.

    Raises:
        TPError: in place of any exception but the plugin's own.
    """
    running: list[tuple[str, nn.Module, tuple[Any, ...]]] = []

    def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append((path, module, args))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    runtime = current()
    with contextlib.nullcontext() if runtime is None else runtime.region.step():  # they look at what this rank has
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(enter, path), prepend=True))
            handles.append(module.register_forward_hook(leave))  # not called after an exception
    try:
        yield
    except TPError:
        raise
    except Exception as error:
        path, module, args = running[-1] if running else ("", model, ())
        place = f"{path or '(the model)'} ({type(module).__name__})"
        reason = (str(error).strip().splitlines() or [""])[0]
        if plan is None:
            raise TPError(f"the whole model cannot run: {place} raised {type(error).__name__}: {reason}") from error
        hint = _hint_for_linear(path, module, args, plan) or hint_for_block(model, plan, path, rank)
        raise TPError(
            f"the sharded model cannot run: {place} raised {type(error).__name__}: {reason}"
            + (f"; {hint}" * bool(hint))
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _hint_for_linear(path: str, module: nn.Module, args: tuple[Any, ...], plan: Plan) -> str:
    """Says that a linear got a share where it wants all features, or the other way round."""
    if path not in (*plan.columns, *plan.rows) or not args or not isinstance(args[0], torch.Tensor):
        return ""
    layout, found = plan.layouts[f"{path}.weight"], args[0].shape[-1]
    whole = layout.shape[0 if isinstance(module, Conv1D) else 1]
    if path in plan.columns and found < whole:
        return f"a column-parallel module wants all {whole} features and got {found}, a rank's share: name it in `row`"
    if path in plan.rows and found == whole:
        return f"a row-parallel module wants a rank's share and got all {whole} features: name it in `columns`"
    return ""


def hint_for_block(model: nn.Module, plan: Plan, path: str, rank: int = 0) -> str:
    """What the policy's block around ``path`` may lack; empty outside of blocks."""
    around = [block for block in plan.blocks if path == block or path.startswith(block + ".")]
    if not around:
        return ""
    block = max(around, key=len)
    counts = "; ".join(
        f"{name} = {whole} counts the whole model's, this rank has {mine}: add it to `local_sizes` as {meaning!r}"
        for name, meaning, whole, mine in _whole_counts(model.get_submodule(block), plan, block, rank)
    )
    if counts:
        return f"in {block}, {counts}"
    return (
        f"what enters {block} is right, so look at this block's splits (order and counts of heads), `local_sizes`, "
        "`row`"
    )


def hint_for_gradient(name: str, plan: Plan, order: list[str]) -> str:
    """What the policy may lack if ``name`` is the first parameter of the backward whose gradient is wrong.

    Args:
        order: paths of the model's modules in the order in which the forward began them.
    """
    module = name.rpartition(".")[0]
    if any(module == block or module.startswith(block + ".") for block in plan.blocks):
        if plan.layouts[name].is_sharded or name in plan.partial:
            return ""
        return "a whole parameter that each rank applies to its own share belongs in the block's `partial`"
    later = order[order.index(module) :] if module in order else []
    block = next((path for path in later if path in plan.blocks), None)
    return f"is every activation that enters {block} named in its `inputs`?" if block else ""


def _whole_counts(module: nn.Module, plan: Plan, block: str, rank: int) -> Iterator[tuple[str, str, int, int]]:
    """Attributes that the module's methods read and that hold a count of the whole model: name, meaning, both."""
    counts: dict[str, tuple[int, int]] = {}
    if plan.blocks[block].heads is not None:
        heads = plan.blocks[block].heads
        (q0, q1), (kv0, kv1) = heads.q[rank], heads.kv[rank]
        counts["q_heads"] = heads.q_heads, q1 - q0
        counts["kv_heads"] = heads.kv_heads, kv1 - kv0
        counts["groups"] = heads.q_heads // heads.kv_heads, (q1 - q0) // (kv1 - kv0)
    for row in plan.blocks[block].rows:
        layout = plan.layouts[f"{row}.weight"]
        assert layout.dim is not None
        width = layout.shape[layout.dim], layout.local_shape(rank)[layout.dim]
        counts["q_width" if plan.blocks[block].heads else "width"] = width
    source = _methods(type(module))
    for name, value in vars(module).items():
        if type(value) is not int or (block, name) in plan.attributes or not re.search(rf"self\.{name}\b", source):
            continue
        for meaning in _meanings(name):
            whole, mine = counts.get(meaning, (None, 0))
            if value == whole != mine:
                yield name, meaning, value, mine
                break


def _meanings(name: str) -> tuple[str, ...]:
    """What an attribute of this name may count; the number alone would not tell (a head size may equal the heads)."""
    if re.search("dim|size|width|len", name):
        return "q_width", "width"
    return ("groups",) if re.search("group|rep", name) else ("q_heads", "kv_heads")


def _methods(kind: type) -> str:
    """Source of what a module does after it was made."""
    written = []
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(cls).items():
            if inspect.isfunction(function) and name != "__init__":
                with contextlib.suppress(OSError):
                    written.append(inspect.getsource(function))
    return "\n".join(written)
