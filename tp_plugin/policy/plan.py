"""Policy + model + tp → what happens to every parameter. Reads shapes only, so it works on the meta device."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Attention, Block, Count, Policy, Vocabulary
from tp_plugin.policy.layout import ParamLayout, Parts, Range
from tp_plugin.policy.lora import is_adapted, plan_adapters
from tp_plugin.policy.split import HeadSplit, Split, vocabulary_rows

_NO_HEADS = HeadSplit(((0, 1),), ((0, 1),))


@dataclass
class Plan:
    """What sharding one model on ``tp`` ranks means, by module path and parameter name.

    Attributes:
        tp: TP size.
        layouts: layout of every parameter, tied names included.
        blocks: path → names of the forward's activation inputs.
        entries: path → path of the module at whose input it begins, where that is another one.
        rows: paths of row-parallel modules.
        columns: paths of column-parallel modules.
        partial: names of replicated parameters whose gradient must be summed over the TP group.
        attributes: (path, attribute) → its value on each rank; the attribute may be dotted.
        owners: path of a row- or column-parallel module → path of its block.
        head_inputs: path → argument → its dimension of heads, their number, and each rank's range.
        wide_norms: path of a norm over a split width → its whole width.
        embeddings, heads: paths of vocabulary-parallel modules.
        dropouts: paths of an adapter's dropout → whether its input is "replicated" or "sharded".
    """

    tp: int
    layouts: dict[str, ParamLayout] = field(default_factory=dict)
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    partial: set[str] = field(default_factory=set)
    attributes: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    head_inputs: dict[str, dict[str, tuple[int, int, tuple[Range, ...]]]] = field(default_factory=dict)
    wide_norms: dict[str, int] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    dropouts: dict[str, str] = field(default_factory=dict)

    def sharded_share(self, parameters: Mapping[str, torch.Tensor]) -> float:
        """Share of the parameters' elements that is really split (0…1)."""
        numel = {name: p.numel() for name, p in parameters.items()}
        return sum(n for name, n in numel.items() if self.layouts[name].is_sharded) / max(1, sum(numel.values()))


def make_plan(model: nn.Module, policy: Policy, tp: int) -> Plan:
    """What ``policy`` does to ``model`` on ``tp`` ranks.

    Raises:
        PolicyError: a module that the policy relies on is missing or of an unknown type, a count does not divide,
            or a parameter is claimed by nothing.
    """
    planner = Planner(model, policy, tp)
    for block in policy.blocks:
        planner.plan_block(block)
    if policy.vocabulary is not None:
        planner.plan_vocabulary(policy.vocabulary)
    planner.claim_replicated()
    planner.check_tied()
    return planner.plan


def check_config(config: object, policy: Policy, tp: int) -> None:
    """Raise PolicyError if the head counts in ``config`` forbid ``tp``; needs no model, so it runs before any load."""
    for block in policy.blocks:
        if isinstance(block, Attention):
            _head_split(config, block, tp)


class Planner:
    """Collects the :class:`Plan` of one model."""

    def __init__(self, model: nn.Module, policy: Policy, tp: int):
        self.model, self.policy, self.plan = model, policy, Plan(tp)
        self.config = getattr(model, "config", None)
        self.modules = dict(model.named_modules())
        # remove_duplicate=False: a tied parameter has several names, and each must be claimed
        self.parameters = dict(model.named_parameters(remove_duplicate=False))

    def plan_block(self, block: Block) -> None:
        paths = list(self._matching(block.path))
        if not paths and not block.optional:
            self.fail(f"no module matches {block.path!r}")
        for path in paths:
            heads = _head_split(self.config, block, self.plan.tp) if isinstance(block, Attention) else _NO_HEADS
            if path in self.plan.blocks:
                self.fail(f"{path} is two blocks")
            self.plan.blocks[path] = block.inputs
            if block.at:
                if f"{path}.{block.at}" not in self.modules:
                    self.fail(f"there is no module {path}.{block.at}")
                self.plan.entries[path] = f"{path}.{block.at}"
            linears = {*self.plan.rows, *self.plan.columns}
            for name, split in block.columns.items():
                if name.endswith("?"):
                    name = name[:-1]
                    if f"{path}.{name}" not in self.modules:
                        continue
                self._linear(f"{path}.{name}", split, heads, column=True)
            for name, split in block.row.items():
                self._linear(f"{path}.{name}", split, heads, column=False)
            for linear in {*self.plan.rows, *self.plan.columns} - linears:
                self.plan.owners[linear] = path
            for name in block.partial:
                for claimed in self._below(f"{path}.{name}"):
                    self.claim(claimed, ParamLayout.replicated(self.parameters[claimed].shape, self.plan.tp))
                    self.plan.partial.add(claimed)
            for name, (split, dim) in block.per_head.items():
                self._per_head(f"{path}.{name}", split, dim, heads)
            for name, split in block.wide_norms.items():
                self._wide_norm(f"{path}.{name}", split, heads)
            if block.head_inputs:
                inputs = {name: (dim, heads.q_heads, heads.q) for name, dim in block.head_inputs.items()}
                self.plan.head_inputs[path] = inputs
            if not block.inputs and len(block.columns) != 1:
                self.fail(f"block {block.path!r} has no inputs, but {len(block.columns)} column-parallel modules")
            self._attributes(path, block, heads)

    def _per_head(self, name: str, split: Split, dim: int, heads: HeadSplit) -> None:
        for claimed in self._below(name):
            shape = tuple(self.parameters[claimed].shape)
            try:
                self.claim(claimed, ParamLayout(shape, dim, split(shape[dim], self.plan.tp, heads)))
            except PolicyError as error:
                self.fail(f"{claimed}: {error}")

    def _wide_norm(self, path: str, split: Split, heads: HeadSplit) -> None:
        if path.endswith("?"):
            path = path[:-1]
            if path not in self.modules:
                return
        self._per_head(f"{path}.weight", split, 0, heads)
        self.plan.wide_norms[path] = self.parameters[f"{path}.weight"].shape[0]

    def _attributes(self, path: str, block: Block, heads: HeadSplit) -> None:
        for attribute, meaning in block.local.items():
            try:
                whole = operator.attrgetter(attribute)(self.modules[path])
            except AttributeError:
                self.fail(f"{path} has no attribute {attribute!r}, which the policy wants to set")
            counts = {
                "q_heads": lambda k: _count(heads.q[k]),
                "kv_heads": lambda k: _count(heads.kv[k]),
                "groups": lambda k: _count(heads.q[k]) // _count(heads.kv[k]),
                "q_width": lambda k: _count(heads.q[k]) * (whole // heads.q_heads),  # noqa: B023 (called below)
                "kv_width": lambda k: _count(heads.kv[k]) * (whole // heads.kv_heads),  # noqa: B023
                "width": lambda k: self._row_width(path, block, k),
            }
            if meaning not in counts:
                self.fail(f"local[{attribute!r}] = {meaning!r}; write one of {', '.join(counts)}")
            self.plan.attributes[path, attribute] = tuple(counts[meaning](k) for k in range(self.plan.tp))

    def _row_width(self, path: str, block: Block, rank: int) -> int:
        row = f"{path}.{next(iter(block.row))}"
        layout = self.plan.layouts[f"{row}.base_layer.weight" if is_adapted(self.modules[row]) else f"{row}.weight"]
        assert layout.dim is not None
        return layout.local_shape(rank)[layout.dim]

    def _linear(self, path: str, split: Split, heads: HeadSplit, *, column: bool) -> None:
        module = self.modules.get(path)
        if module is None:
            self.fail(f"there is no module {path!r}")
        if is_adapted(module):
            self._linear(f"{path}.base_layer", split, heads, column=column)
            parts = self._parts(f"{path}.base_layer")
            plan_adapters(self, path, module, parts, column=column)
            return
        if type(module) not in (nn.Linear, Conv1D) and type(module).__name__ not in self.policy.linears:
            self.fail(
                f"{path} is a {type(module).__name__}; column- and row-parallel modules must be plain nn.Linear or "
                "Conv1D (quantized and wrapped layers are not supported)"
            )
        weight = self.parameters[f"{path}.weight"]
        # Conv1D keeps its weight as (in, out), nn.Linear as (out, in)
        out_dim = 1 if isinstance(module, Conv1D) else 0
        dim = out_dim if column else 1 - out_dim
        try:
            parts = split(weight.shape[dim], self.plan.tp, heads)
        except PolicyError as error:
            self.fail(f"{path}: {error}")
        self.claim(f"{path}.weight", ParamLayout(tuple(weight.shape), dim, parts))
        if getattr(module, "bias", None) is not None:
            bias = tuple(self.parameters[f"{path}.bias"].shape)
            # a row-parallel bias is added once, after the reduction: every rank holds all of it
            self.claim(
                f"{path}.bias", ParamLayout(bias, 0, parts) if column else ParamLayout.replicated(bias, self.plan.tp)
            )
        (self.plan.columns if column else self.plan.rows).append(path)

    def _parts(self, path: str) -> Parts:
        return self.plan.layouts[f"{path}.weight"].parts

    def plan_vocabulary(self, vocabulary: Vocabulary) -> None:
        embeddings = vocabulary.embedding if isinstance(vocabulary.embedding, tuple) else (vocabulary.embedding,)
        wanted = [(pattern, self.plan.embeddings) for pattern in embeddings] + [(vocabulary.head, self.plan.heads)]
        for pattern, paths in wanted:
            for path in self._matching(pattern) if pattern else ():
                if f"{path}.weight" not in self.parameters:
                    kind = type(self.modules[path]).__name__
                    self.fail(
                        f"{path} is wrapped by {kind}; adapters and modules_to_save on the embedding or the head "
                        "cannot be sharded"
                    )
                weight = tuple(self.parameters[f"{path}.weight"].shape)
                parts, rows = vocabulary_rows(weight[0], self.plan.tp)
                self.claim(f"{path}.weight", ParamLayout(weight, 0, parts, pad_to=rows))
                if f"{path}.bias" in self.parameters:
                    self.claim(f"{path}.bias", ParamLayout(weight[:1], 0, parts, pad_to=rows))
                paths.append(path)

    def claim_replicated(self) -> None:
        unclaimed = []
        owned = {id(self.parameters[name]): layout for name, layout in self.plan.layouts.items()}
        for name, parameter in self.parameters.items():
            if name in self.plan.layouts:
                continue
            replicated = any(_matches(pattern, part) for pattern in self.policy.replicated for part in _prefixes(name))
            user = self.modules[name.rpartition(".")[0]]
            if id(parameter) in owned and not replicated and not isinstance(user, nn.Linear | nn.Embedding | Conv1D):
                # a second name in a module that does not compute with it (BERT's `cls.predictions.bias`)
                self.plan.layouts[name] = owned[id(parameter)]
                continue
            if not replicated:
                unclaimed.append(name)
            self.plan.layouts[name] = ParamLayout.replicated(parameter.shape, self.plan.tp)
        if unclaimed:
            shown = ", ".join(unclaimed[:5]) + (f" and {len(unclaimed) - 5} more" if len(unclaimed) > 5 else "")
            self.fail(
                f"nothing in the policy claims {shown}; name each in a block, in the vocabulary, or in `replicated`"
            )

    def check_tied(self) -> None:
        first: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            other = first.setdefault(id(parameter), name)
            if self.plan.layouts[other] != self.plan.layouts[name]:
                self.fail(f"{other} and {name} are one tied parameter but would be sharded differently")

    def claim(self, name: str, layout: ParamLayout) -> None:
        """Say how parameter ``name`` lies; each may be claimed once."""
        if name in self.plan.layouts:
            self.fail(f"{name} is claimed twice")
        self.plan.layouts[name] = layout

    def _matching(self, pattern: str) -> Iterator[str]:
        return (path for path in self.modules if _matches(pattern, path))

    def _below(self, path: str) -> list[str]:
        if path.endswith("?"):
            path = path[:-1]
            if path not in self.modules and path not in self.parameters:
                return []
        names = [name for name in self.parameters if name == path or name.startswith(path + ".")]
        if not names and path not in self.modules:
            self.fail(f"there is no module or parameter {path!r}")
        return names

    def fail(self, reason: str) -> NoReturn:
        """Raise a PolicyError that names policy and model."""
        kind = type(self.model).__name__
        raise PolicyError(f"the policy for {'/'.join(self.policy.model_types)} does not fit this {kind}: {reason}.")


def _head_split(config: object, block: Attention, tp: int) -> HeadSplit:
    q_heads = _number(config, block.heads)
    if not isinstance(q_heads, int):
        raise PolicyError(f"the config has no integer {block.heads!r}, which the policy reads the head count from")
    return HeadSplit.of(q_heads, _number(config, block.kv_heads) or q_heads, tp)


def _number(config: object, count: Count) -> int | None:
    return count(config) if callable(count) else getattr(config, count, None)


def _count(r: tuple[int, int]) -> int:
    return r[1] - r[0]


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(1, len(parts) + 1))


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> re.Pattern[str]:
    body = r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split("."))
    return re.compile(rf"(?:^|.*\.){body}")


def _matches(pattern: str, path: str) -> bool:
    return _pattern(pattern).fullmatch(path) is not None
