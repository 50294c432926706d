"""A training step of one rank on the meta device: what each kind of layer keeps, takes and sends, and what is around.

The model's own code runs, sharded as in a run, but on shapes: a stack is cut down to two layers of each kind, and what
the later of them takes stands for all of its kind.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
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
        peak: the most at one time inside, with gradients, beyond those alive at its beginning.
        gradients: bytes of the parameters' gradients that are made in it.
        output: bytes of what a layer returns.
        work: what is computed.
        sent: collectives over the TP group.
    """

    kept: int = 0
    peak: int = 0
    gradients: int = 0
    output: int = 0
    work: Work = field(default_factory=Work)
    sent: Sent = field(default_factory=Counter)


@dataclass
class Layers:
    """A stack of layers.

    Attributes:
        path: where it stands in the model.
        kinds: the kind of each of its layers, in order.
        chosen: the layers that are traced: two of each kind, and the last.
    """

    path: str
    kinds: list[int]
    chosen: list[int]

    def stand_in(self, at: int) -> int:
        """The traced layer that stands for layer ``at``: itself, or the second of its kind."""
        alike = [one for one in self.chosen if self.kinds[one] == self.kinds[at]]
        return at if at in alike else alike[min(1, len(alike) - 1)]


Key = tuple[str, int]
"""``(path of a stack, number)`` of a layer; ``("", n)`` of the n-th stretch around stacks."""


@dataclass
class Trace:
    """A step of one micro-batch: its segments in the order in which they run, those of all layers."""

    forward: list[tuple[Key, Segment]]
    backward: list[tuple[Key, Segment]]


def find_layers(model: nn.Module, plan: Plan) -> list[Layers]:
    """The stacks of the model whose layers hold the blocks of the plan.

    Raises:
        TPError: there is none.
    """
    found = {}
    for path in plan.blocks:
        match = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
        if match and isinstance(model.get_submodule(match[1]), nn.ModuleList):
            found[match[1]] = _listed(model, match[1])
    if not found:
        raise TPError(f"{type(model).__name__} has no list of layers that its policy splits; nothing can be planned")
    return [Layers(path, *_kinds(layers)) for path, layers in found.items()]


def _listed(model: nn.Module, path: str) -> list[nn.Module]:
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def _kinds(layers: list[nn.Module]) -> tuple[list[int], list[int]]:
    known: dict[str, int] = {}
    kinds = [known.setdefault(_kind(layer), len(known)) for layer in layers]
    seen: Counter[int] = Counter()
    chosen = []
    for at, kind in enumerate(kinds):
        seen[kind] += 1
        if seen[kind] <= 2 or at == len(kinds) - 1:
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
    lists = [(layers, _listed(model, layers.path)) for layers in stacks_of]
    memo = {
        id(layer): nn.Identity() for layers, whole in lists for at, layer in enumerate(whole) if at not in layers.chosen
    }
    small = copy.deepcopy(model, memo)
    for layers, _ in lists:
        owner, _, name = layers.path.rpartition(".")
        kept = nn.ModuleList(_listed(small, layers.path)[at] for at in layers.chosen)
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

    nests = is_open = False

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
    checkpointing: bool = False,
) -> Trace:
    """Run a step of ``model``, which :func:`cut` has made, on ``batch``."""
    model = copy.deepcopy(model).train()
    group = shard_on_meta(model, policy, tp, options)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    tokens = max(math.prod(tensor.shape[:2]) for tensor in tensors)
    with warnings.catch_warnings(), counting([*model.parameters(), *model.buffers(), *tensors], tokens) as ledger:
        warnings.simplefilter("ignore")
        if checkpointing:
            _checkpoint(model, ledger)
        recorder = _Recorder(ledger, group, model)
        recorder.watch(model, stacks_of)
        output = model(**batch)
        loss = _loss(output)
        del output
        recorder.turn()
        loss.backward()
        del loss
        recorder.end()
    by_path = {layers.path: layers for layers in stacks_of}
    return Trace(_all_layers(recorder.forward, by_path, 1), _all_layers(recorder.backward, by_path, -1))


def _checkpoint(model: Any, ledger: MetaLedger) -> None:
    name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    contexts = lambda: (contextlib.nullcontext(), FusedKernels(ledger))  # noqa: E731
    enable({"use_reentrant": False, "context_fn": contexts})
    if not all(p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()


def _all_layers(
    found: list[tuple[Key, Segment]], stacks_of: Mapping[str, Layers], step: int
) -> list[tuple[Key, Segment]]:
    """The segments of a cut model, with what stands for each layer that was cut out in its place."""
    known = dict(found)
    whole: list[tuple[Key, Segment]] = []
    for (path, at), segment in found:
        if whole and path and whole[-1][0][0] == path:
            for number in range(whole[-1][0][1] + step, at, step):
                whole.append(((path, number), known[path, stacks_of[path].stand_in(number)]))
        whole.append(((path, at), segment))
    return whole


def _loss(output: Any) -> torch.Tensor:
    loss: Any = getattr(output, "loss", None)
    if loss is None:
        found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        loss = sum(t.pow(2).mean() for t in found if isinstance(t, torch.Tensor) and t.is_floating_point())
    return loss  # type: ignore[no-any-return]


class _Recorder:
    """Cuts a step into segments at the boundaries of layers."""

    def __init__(self, ledger: MetaLedger, group: ShapeGroup, model: nn.Module):
        self.ledger, self.group = ledger, group
        self.forward: list[tuple[Key, Segment]] = []
        self.backward: list[tuple[Key, Segment]] = []
        self._without_gradient = {id(p): p for p in model.parameters() if p.requires_grad}
        self._into, self._around, self._at = self.forward, 0, ledger.live
        ledger.restart()
        group.sent.clear()

    def watch(self, model: nn.Module, stacks_of: list[Layers]) -> None:
        """Have the layers of ``model`` say when they begin and end; and their gradients, when they come."""
        for layers in stacks_of:
            listed = _listed(model, layers.path)
            keys = [(layers.path, at) for at in layers.chosen]
            begin = functools.partial(self._begin, keys[0])
            listed[0].register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
            for layer, key, following in zip(listed, keys, [*keys[1:], None], strict=True):
                layer.register_forward_hook(functools.partial(self._leave, key, following))

    def _begin(self, key: Key, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._into is self.backward:  # the layer runs again
            return
        self._cut(("", self._around))
        x = _first((*args, *kwargs.values()))
        if x is not None and x.requires_grad:
            x.register_hook(lambda grad: self._cut(key))

    def _leave(self, key: Key, following: Key | None, module: nn.Module, args: Any, output: Any) -> None:
        if self._into is self.backward:
            return
        y = _first(output if isinstance(output, tuple) else (output,))
        self._cut(key, 0 if y is None else y.numel() * y.element_size())
        if following is None:
            self._around += 1
        if y is not None and y.requires_grad:
            # the gradient of its output ends the backward of what comes after it
            key_after = following or ("", self._around)
            y.register_hook(lambda grad: self._cut(key_after))

    def turn(self) -> None:
        """The backward begins."""
        self._cut(("", self._around))
        self._into = self.backward

    def end(self) -> None:
        """It has ended."""
        gc.collect()
        self._cut(("", 0))

    def _cut(self, key: Key, output: int = 0) -> None:
        live, ledger, made = self.ledger.live, self.ledger, 0
        for number, parameter in list(self._without_gradient.items()):
            if parameter.grad is not None:
                made += parameter.grad.numel() * parameter.grad.element_size()
                del self._without_gradient[number]
        kept, sent = live - self._at - made, Counter(self.group.sent)
        self._into.append((key, Segment(kept, ledger.peak - self._at, made, output, ledger.work, sent)))
        self._at = live
        ledger.restart()
        self.group.sent.clear()


def _first(values: Any) -> torch.Tensor | None:
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)
