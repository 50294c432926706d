"""Hooks that a script puts on modules of a sharded model get what one process has there, and see whole weights.

Ours run before the script's on what comes out of a module, and after them on what goes in: so from outside a block or a
head looks like that of one process. Inside of a block values are gathered for the hook, and cut again.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout, Plan
from tp_plugin.policy.plan import BlockPlan
from tp_plugin.shard.build import Parts
from tp_plugin.tensor.global_view import ScriptRegion
from tp_plugin.tensor.hook_values import AsItIs, AttentionOutput, Features, InnerFeatures, Tokens, Values

PRE, FORWARD, BACKWARD, BACKWARD_PRE = "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"
"""The dictionaries of a module that hold its hooks."""
Hooks = OrderedDict[int, Callable[..., Any]]


@dataclass
class ModuleHooks:
    """Stands in ``module.tp_hooks`` of every module of a sharded model.

    Attributes:
        region: of the script.
        given: how the arguments lie before our own hooks.
        taken: how they lie behind them, where the forward takes them.
        output: how what comes out lies.
        ours: ids of the handles of our own hooks.
        on_one_stage: the module's path, if other pipeline stages do not run it.
    """

    region: ScriptRegion
    given: Values
    taken: Values
    output: Values
    ours: set[int]
    on_one_stage: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHooks:
        return self

    def adopt(self, module: nn.Module, number: int | None = None) -> None:
        """Wrap the script's hook of that number, or all that ``module`` has, and order ours and theirs."""
        for where in (PRE, FORWARD, BACKWARD, BACKWARD_PRE):
            there: dict[int, Any] = getattr(module, where) or {}
            for one in list(there) if number is None else [number] * (number in there):
                if one not in self.ours and self.on_one_stage:
                    refuse_hook(self.on_one_stage, there[one])
                elif one not in self.ours:
                    there[one] = ScriptHook(there[one], self, where)
        before, after = cast(Hooks, module._forward_pre_hooks), cast(Hooks, module._forward_hooks)
        for one in [one for one in before if one in self.ours]:
            before.move_to_end(one)
        for one in reversed([one for one in after if one in self.ours]):
            after.move_to_end(one, last=False)


class ScriptHook:
    """A hook of the script's on one module.

    Args:
        hook: the script's.
        at: of the module.
        where: one of the dictionaries that hold hooks.
    """

    def __init__(self, hook: Callable[..., Any], at: ModuleHooks, where: str):
        self.hook, self.at, self.where = hook, at, where

    def __deepcopy__(self, memo: dict[int, Any]) -> ScriptHook:
        return ScriptHook(copy.deepcopy(self.hook, memo), self.at, self.where)

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        """What the hook returns, as this rank computes with it."""
        if (
            not torch.compiler.is_compiling() and self.at.region.is_script
        ):  # the script calls the module by itself: everything is whole
            return self.hook(module, *values)
        run = {PRE: self._pre, FORWARD: self._forward, BACKWARD: self._backward, BACKWARD_PRE: self._backward_pre}
        return run[self.where](module, *values)

    def _pre(self, module: nn.Module, args: Any, *kwargs: Any) -> Any:
        given = (args, *kwargs)
        seen = _map(given, self.at.given.whole)
        with self._script():
            result = self.hook(module, *seen)
        if result is None:
            result = seen if kwargs else seen[0]
        elif not kwargs and not isinstance(result, tuple):
            result = (result,)
        return _cut(result, given if kwargs else args, seen if kwargs else seen[0], self.at.given.part)

    def _forward(self, module: nn.Module, *values: Any) -> Any:
        *taken, output = values
        whole = _map(output, self.at.output.whole)
        with self._script():
            result = self.hook(module, *_map(taken, self.at.taken.whole), whole)
        return _cut(whole if result is None else result, output, whole, self.at.output.part)

    def _backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        with torch.no_grad():
            seen = _map(grad_input, self.at.taken.gradient), _map(grad_output, self.at.output.gradient)
            with self._script():
                result = self.hook(module, *seen)
            return None if result is None else _map(result, self.at.taken.gradient_part)

    def _backward_pre(self, module: nn.Module, grad_output: Any) -> Any:
        with torch.no_grad():
            seen = _map(grad_output, self.at.output.gradient)
            with self._script():
                result = self.hook(module, seen)
            return None if result is None else _map(result, self.at.output.gradient_part)

    @contextlib.contextmanager
    def _script(self) -> Iterator[None]:
        if torch.compiler.is_compiling():
            yield
            return
        with self.at.region.script():
            yield


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with its floating-point tensors changed: itself, or those in a tuple, list or dictionary."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    return value


def _cut(value: Any, given: Any, seen: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value``, which stands for ``seen``, changed where ``seen`` is not what was ``given``."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() and seen is not given else value
    if type(value) is dict:
        return {key: _cut(item, given.get(key), seen.get(key), change) for key, item in value.items()}
    if type(value) in (tuple, list) and type(given) in (tuple, list) and len(value) == len(given):
        return type(value)(_cut(*three, change) for three in zip(value, given, seen, strict=True))
    return value


def adopt_hooks(model: nn.Module, plan: Plan, parts: Parts, region: ScriptRegion, staged: bool = False) -> None:
    """Put :class:`ModuleHooks` on every module of ``model``, and wrap the hooks that are there.

    Args:
        staged: whether the modules inside stand on pipeline stages.
    """
    for path, module in model.named_modules():
        given, taken, output = _lies(path, plan, parts)
        module.tp_hooks = at = ModuleHooks(region, given, taken, output, parts.our_hooks, path if staged else "")
        at.adopt(module)


def refuse_hook(path: str, hook: Any) -> None:
    """Raise TPError for a script's hook on a module that one pipeline stage runs."""
    if getattr(hook, "__name__", "").startswith(
        "make_inputs_require_grad"
    ):  # of transformers, PEFT: harmless elsewhere
        return
    raise TPError(
        f"a hook is registered on {path}, which one pipeline stage runs; hooks inside of the model are not called on "
        "the others: register it on the model itself, or write pp_size: 1"
    )


def _lies(path: str, plan: Plan, parts: Parts) -> tuple[Values, Values, Values]:
    """How arguments lie before our hooks and behind them, and how outputs do."""
    outside: Values = AsItIs()
    for one in parts.stacks:
        if any(f"{path}.".startswith(f"{layer}.") for layer in one.layers):
            outside = Tokens(one.stack)
            if path == one.layers[-1]:
                return outside, Tokens(one.stack, behind=True), outside
    own = path if f"{path}.weight" in plan.layouts else f"{path}.base_layer"
    around = [block for block in plan.blocks if path != block and path.startswith(f"{block}.")]
    if not around:
        taken, output = outside, outside
        block = plan.blocks.get(path)
        if block is not None:
            group = parts.blocks[path].group
            taken = _once(plan, group) if block.inputs and block.entry == path else outside
            if block.heads is not None:
                heads = plan.query_heads(path)
                layout = ParamLayout((max(stop for part in heads for _, stop in part),), 0, heads)
                output = AttentionOutput(outside, Features(layout, group, dim=1))
        elif path in parts.heads:
            taken = _once(plan, parts.heads[path].vocabulary.group)
        return outside, taken, output
    name = max(around, key=len)
    return _inside(path, own, name, plan.blocks[name], plan, parts, outside)


def _inside(
    path: str, own: str, name: str, block: BlockPlan, plan: Plan, parts: Parts, outside: Values
) -> tuple[Values, Values, Values]:
    group = parts.blocks[name].group
    once = _once(plan, group)
    begins = path in block.input_of or own in block.input_of or path == block.entry
    if block.experts is None:
        if own in block.columns:
            return outside if begins else once, once, _features(plan, own, group)
        if own in block.rows:
            features = _features(plan, own, group)
            return features, features, outside
        if path in plan.sharded_norms:
            features = _features(plan, path, group)
            return features, features, features
    if path in block.output_of:
        return outside, outside, once
    if begins:
        return outside, once, InnerFeatures(path, name, None)
    rows = block.rows if block.heads is None and block.experts is None else []
    inner = InnerFeatures(path, name, _features(plan, rows[0], group) if len(rows) == 1 else None)
    return inner, inner, inner


def _features(plan: Plan, path: str, group: Any) -> Features:
    layout = plan.layouts[f"{path}.weight"].features
    if layout.dim is None:
        return _once(plan, group)
    return Features(ParamLayout((layout.shape[layout.dim],), 0, layout.parts), group)


def _once(plan: Plan, group: Any) -> Features:
    return Features(ParamLayout.replicated((1,), plan.tp), group)
