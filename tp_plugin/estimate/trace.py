"""A training step of one rank on the meta device: what each kind of layer keeps, takes and sends, and what is around.

The model's own code runs, sharded as in a run, but on shapes: a stack is cut down to two layers of each kind, and what
the later of them takes stands for all of its kind.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.estimate.ledger import FusedKernels, MetaLedger, Work, counting
from tp_plugin.estimate.shape_group import NoPeers, ShapeGroup
from tp_plugin.policy import Plan, Policy, make_plan
from tp_plugin.policy.stacks import between, stacks
from tp_plugin.shard import hooks
from tp_plugin.shard.build import build_parts

Sent = Counter[tuple[str, int]]
"""``(operation, bytes that a rank puts in)`` → how many."""


@dataclass
class Segment:
    """A stretch of a step, such as the forward of a layer.

    Attributes:
        kept: by how much the bytes alive have grown at its end, without the parameters' gradients.
        peak: the most at one time inside, beyond those alive at its beginning.
        work: what is computed.
        sent: collectives over the TP group.
    """

    kept: int = 0
    peak: int = 0
    work: Work = field(default_factory=Work)
    sent: Sent = field(default_factory=Counter)


@dataclass
class Layers:
    """A stack of layers.

    Attributes:
        path: where it stands in the model.
        kinds: the kind of each of its layers, in order.
        chosen: the layers that are traced.
    """

    path: str
    kinds: list[int]
    chosen: list[int]


@dataclass
class Trace:
    """A step of one micro-batch at one layout.

    Attributes:
        forward, backward: the segments between the layers, in the order in which they run: what is before, (stack,
            kind) for a layer, what is behind.
    """

    forward: list[tuple[Any, Segment]]
    backward: list[tuple[Any, Segment]]


def find_layers(model: nn.Module, plan: Plan) -> list[Layers]:
    """The stacks of the model whose layers hold the blocks of the plan.

    Raises:
        TPError: there is none.
    """
    found = {}
    for path in plan.blocks:
        match = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
        if match and isinstance(model.get_submodule(match[1]), nn.ModuleList):
            found[match[1]] = list(model.get_submodule(match[1]))
    if not found:
        raise TPError(f"{type(model).__name__} has no list of layers that its policy splits; nothing can be planned")
    return [Layers(path, *_kinds(layers)) for path, layers in found.items()]


def _kinds(layers: list[nn.Module]) -> tuple[list[int], list[int]]:
    known: dict[str, int] = {}
    kinds = [known.setdefault(_kind(layer), len(known)) for layer in layers]
    seen: Counter[int] = Counter()
    chosen = []
    for at, kind in enumerate(kinds):
        seen[kind] += 1
        if seen[kind] <= 2:
            chosen.append(at)
    return kinds, chosen


def _kind(layer: nn.Module) -> str:
    """Equal for layers that compute alike: the same classes, sizes and switches."""
    lines = []
    for path, module in layer.named_modules():
        settings = {k: v for k, v in vars(module).items() if type(v) in (int, float, bool, str)}
        settings.pop("layer_idx", None)
        shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)]
        lines.append((path, type(module).__qualname__, sorted(settings.items()), shapes))
    return repr(lines)


def cut(model: nn.Module, stacks_of: list[Layers]) -> nn.Module:
    """A copy of ``model`` that has only the chosen layers."""
    lists = [(layers, model.get_submodule(layers.path)) for layers in stacks_of]
    memo = {id(layer): nn.Identity() for layers, whole in lists for at, layer in enumerate(whole) if at not in layers.chosen}
    small = copy.deepcopy(model, memo)
    for layers, whole in lists:
        owner, _, name = layers.path.rpartition(".")
        kept = nn.ModuleList(small.get_submodule(layers.path)[at] for at in layers.chosen)
        setattr(small.get_submodule(owner), name, kept)
    whole_depths = {len(layers.kinds): layers.chosen for layers in stacks_of}
    for config in {id(m.config): m.config for m in small.modules() if hasattr(m, "config")}.values():
        _cut_config(config, whole_depths)
    return small


def _cut_config(config: Any, depths: Mapping[int, list[int]]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in depths and len(value) > 1:
            setattr(config, name, [value[at] for at in depths[len(value)]])
        elif "layers" in name and isinstance(value, int) and value in depths:
            setattr(config, name, len(depths[value]))


class _Still:
    """A random stream that is not switched: nothing is drawn."""

    def begin(self, *args: object) -> None: ...

    def end(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def shard_on_meta(model: nn.Module, policy: Policy, tp: int, options: RunConfig) -> ShapeGroup:
    """Make ``model`` rank 0's share, in place, as :func:`tp_plugin.shard.apply.shard_model` does in a run."""
    group = ShapeGroup(tp)
    plan = make_plan(model, policy, tp, expert_parallel=options.expert_parallel, leave_whole=options.leave_whole)
    split = stacks(model, plan) if options.sequence_parallel and tp > 1 else {}
    plan.partial |= between(plan, [layer for layers in split.values() for layer in layers])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = plan.layouts[name].shard(parameter.data, 0)
    if tp == 1:
        return group
    parts = build_parts(model, plan, split, group, NoPeers(), options)
    for block in parts.blocks.values():
        block.region = _Still()  # type: ignore[assignment]
    for stack in parts.stacks:
        for region in stack.regions.values():
            region.region = _Still()  # type: ignore[assignment]
    parts.dropouts.clear()
    hooks.install(model, hooks.computing(model, parts), parts)
    return group


def trace(
    model: nn.Module,
    policy: Policy,
    stacks_of: list[Layers],
    batch: Mapping[str, Any],
    tp: int,
    options: RunConfig,
    *,
    checkpointing: bool = False,
    again: bool = False,
) -> Trace:
    """Run a step of ``model``, which :func:`cut` has made, on ``batch``.

    Args:
        again: of the second micro-batch, whose gradients are added to those of the first.
    """
    model = copy.deepcopy(model).train()
    group = shard_on_meta(model, policy, tp, options)
    if hasattr(model, "enable_input_require_grads") and not all(p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()  # type: ignore[operator]
    known = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, torch.Tensor))]
    recorder: _Recorder | None = None
    with warnings.catch_warnings(), counting(iter(known)) as ledger:
        warnings.simplefilter("ignore")
        if checkpointing:
            name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
            enable: Any = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), FusedKernels(ledger))})
        for _ in range(2 if again else 1):
            recorder = _Recorder(ledger, group)
            handles = recorder.watch(model, stacks_of)
            output = model(**batch)
            loss = _loss(output)
            del output
            recorder.turn()
            loss.backward()
            del loss
            recorder.end()
            for handle in handles:
                handle.remove()
    assert recorder is not None
    return Trace(recorder.forward, recorder.backward)


def _loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        loss = sum(t.pow(2).mean() for t in found if isinstance(t, torch.Tensor) and t.is_floating_point())
    return loss  # type: ignore[no-any-return]


class _Recorder:
    """Cuts a step into segments at the boundaries of layers."""

    def __init__(self, ledger: MetaLedger, group: ShapeGroup):
        self.ledger, self.group = ledger, group
        self.forward: list[tuple[Any, Segment]] = []
        self.backward: list[tuple[Any, Segment]] = []
        self._into = self.forward
        self._at = ledger.live
        self._marked: dict[tuple[str, int], tuple[Any, Any]] = {}
        ledger.restart()
        group.sent.clear()

    def watch(self, model: nn.Module, stacks_of: list[Layers]) -> list[Any]:
        handles = []
        for layers in stacks_of:
            for place, (at, layer) in enumerate(zip(layers.chosen, model.get_submodule(layers.path), strict=True)):
                key = (layers.path, layers.kinds[at])

                def before(module: Any, args: Any, kwargs: Any, first: bool = place == 0, key: Any = key) -> None:
                    if self._into is self.backward:  # a layer is recomputed
                        return
                    x = _first(args) if _first(args) is not None else _first(tuple(kwargs.values()))
                    self._cut("between")
                    if first and x is not None and x.requires_grad:
                        x.register_hook(lambda grad, key=key: self._cut(key))

                def after(module: Any, args: Any, output: Any, key: Any = key, place: int = place, path: str = layers.path, kinds: Any = layers) -> None:
                    if self._into is self.backward:
                        return
                    self._cut(key)
                    y = _first(output if isinstance(output, tuple) else (output,))
                    if y is not None and y.requires_grad:
                        # the gradient of its output ends what comes after it: the next layer, or the head
                        after_it = "between" if place + 1 == len(kinds.chosen) else (path, kinds.kinds[kinds.chosen[place + 1]])
                        y.register_hook(lambda grad, key=after_it: self._cut(key))

                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=False))
                handles.append(layer.register_forward_hook(after))
        return handles

    def turn(self) -> None:
        """The backward begins."""
        self._cut("between")
        self._into = self.backward

    def end(self) -> None:
        gc.collect()
        self._cut("between")

    def _cut(self, key: Any) -> None:
        live = self.ledger.live
        segment = Segment(live - self._at, self.ledger.peak - self._at, self.ledger.work, Counter(self.group.sent))
        self._into.append((key, segment))
        self._at = live
        self.ledger.restart()
        self.group.sent.clear()


def _first(values: Any) -> torch.Tensor | None:
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)
