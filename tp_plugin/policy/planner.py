"""Policy + model + tp → what happens to every parameter. Reads shapes only, so it works on the meta device."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Attention, Block, Count, Experts, Policy, Vocabulary
from tp_plugin.policy.layout import ParamLayout, Parts
from tp_plugin.policy.lora import is_adapted, plan_adapters, plan_vocabulary_adapters, variants_of
from tp_plugin.policy.names import matches, prefixes
from tp_plugin.policy.plan import BlockPlan, Plan
from tp_plugin.policy.registry import policy_for
from tp_plugin.policy.split import HeadSplit, Split, even, even_ranges, vocabulary_rows

T = TypeVar("T")
_NO_HEADS = HeadSplit(((0, 1),), ((0, 1),))


def make_plan(
    model: nn.Module, policy: Policy, tp: int, *, expert_parallel: bool = False, leave_whole: Collection[str] = ()
) -> Plan:
    """What ``policy`` does to ``model`` on ``tp`` ranks.

    Args:
        expert_parallel: part the experts, instead of splitting each inside.
        leave_whole: model types of towers that every rank holds whole.

    Raises:
        PolicyError: a module that the policy relies on is missing or of an unknown type, a count does not divide,
            a parameter is claimed by nothing, or there is no policy for a tower.
    """
    settings = {"expert_parallel": expert_parallel, "leave_whole": leave_whole}
    planner = Planner(model, policy, Plan(tp), getattr(model, "config", None), settings)
    planner.plan_all()
    planner.check_tied()
    return planner.plan


def check_config(config: object, policy: Policy, tp: int, leave_whole: Collection[str] = ()) -> None:
    """Raise PolicyError if the head counts in ``config`` forbid ``tp``; needs no model, so it runs before any load."""
    for block in policy.blocks:
        if isinstance(block, Attention):
            _head_split(config, block, tp)
    for name in policy.towers.values():
        tower = getattr(config, name, None)
        if tower is None or tower.model_type in leave_whole:
            continue
        try:
            check_config(tower, policy_for(tower), tp, leave_whole)
        except PolicyError as error:
            raise PolicyError(f"{name} ({tower.model_type}): {error}") from error


class Planner:
    """Collects the :class:`Plan` of one model, or of one tower of it (at ``root``) in its part of the same plan."""

    def __init__(
        self, model: nn.Module, policy: Policy, plan: Plan, config: object, settings: dict[str, Any], root: str = ""
    ):
        self.model, self.policy, self.plan, self.config = model, policy, plan, config
        self.settings, self.root = settings, root
        self.modules = dict(model.named_modules())
        # remove_duplicate=False: a tied parameter has several names, and each must be claimed
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.towers: dict[str, str] = {}
        for pattern, name in policy.towers.items():
            self.towers |= dict.fromkeys(self._matching(pattern), name)

    def plan_all(self) -> None:
        """Claim every parameter of the model or tower."""
        for path, name in self.towers.items():
            self._tower(path, name)
        for block in self.policy.blocks:
            self.plan_block(block)
        if self.policy.vocabulary is not None:
            self.plan_vocabulary(self.policy.vocabulary)
        self.pair_blocks()
        self.claim_replicated()

    def _tower(self, path: str, name: str) -> None:
        config = getattr(self.config, name, None)
        if config is None:
            self.fail(f"{path} is a tower, but the model's config has no {name!r}")
        if config.model_type in self.settings["leave_whole"]:
            for parameter in self._below(path):
                self.claim(parameter, ParamLayout.replicated(self.parameters[parameter].shape, self.plan.tp))
            return
        try:
            policy = policy_for(config)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error
        Planner(self.model, policy, self.plan, config, self.settings, root=path).plan_all()

    def plan_block(self, block: Block) -> None:
        paths = [path for path in self._matching(block.path) if self._has(path, block.requires)]
        if not paths and not block.optional:
            self.fail(f"no module matches {block.path!r}" + (f" and has {block.requires!r}" if block.requires else ""))
        for path in paths:
            heads = self._heads(path, block) if isinstance(block, Attention) else _NO_HEADS
            if path in self.plan.blocks:
                self.fail(f"{path} is two blocks")
            entry = self._module_below(path, block.entry) if block.entry else path
            planned = BlockPlan(block.inputs, entry, heads if isinstance(block, Attention) else None)
            self.plan.blocks[path] = planned
            parted: tuple[str, ...] = ()
            if isinstance(block, Experts) and block.index and self.settings["expert_parallel"]:
                parted = (block.index,)
            self._check_arguments(entry, (*block.inputs, *block.head_inputs, *parted))
            known = len(self.plan.columns), len(self.plan.rows)
            for name, split in self._present(path, block.columns).items():
                self._linear(f"{path}.{name}", split, heads, column=True)
            for name, split in self._present(path, block.row).items():
                self._linear(f"{path}.{name}", split, heads, column=False)
            columns, planned.rows = self.plan.columns[known[0] :], self.plan.rows[known[1] :]
            named = [f"{path}.{name}" for name in self._present(path, block.columns)]
            planned.columns = [one for one in columns if one.removesuffix(".base_layer") in named]
            for name in self._present(path, dict.fromkeys(block.partial)):
                for claimed in self._below(f"{path}.{name}"):
                    self.claim(claimed, ParamLayout.replicated(self.parameters[claimed].shape, self.plan.tp))
                    self.plan.partial.add(claimed)
            for name in self._present(path, dict.fromkeys(block.replicated)):
                for claimed in self._below(f"{path}.{name}"):
                    self.claim(claimed, ParamLayout.replicated(self.parameters[claimed].shape, self.plan.tp))
            if isinstance(block, Experts):
                self._experts(path, block, planned)
            else:
                for name, (split, dim) in self._present(path, block.tensors).items():
                    self._tensor(f"{path}.{name}", split, dim, heads)
            for name, split in self._present(path, block.sharded_norms).items():
                self._sharded_norm(f"{path}.{name}", split, heads)
            planned.head_inputs = {name: (dim, heads.q_heads, heads.q) for name, dim in block.head_inputs.items()}
            planned.input_of = tuple(f"{path}.{name}" for name in self._present(path, dict.fromkeys(block.input_of)))
            planned.output_of = tuple(f"{path}.{name}" for name in self._present(path, dict.fromkeys(block.output_of)))
            if not (block.inputs or planned.input_of or planned.output_of):
                if len(columns) != 1:
                    self.fail(f"block {block.path!r} has no inputs, but {len(columns)} column-parallel modules")
                planned.input_of = (columns[0],)
            for name in self._present(path, dict.fromkeys(block.shared_dropouts)):
                self.plan.dropouts[self._module_below(path, name)] = "replicated"
            self._attributes(path, block, heads)

    def _check_arguments(self, path: str, names: tuple[str, ...]) -> None:
        taken = inspect.signature(self.modules[path].forward).parameters
        for name in names:
            if name not in taken and name != "*":
                self.fail(f"the forward of {path} takes no argument {name!r}, only {', '.join(taken) or 'none'}")

    def _heads(self, path: str, block: Attention) -> HeadSplit:
        try:
            return _head_split(self.config, block, self.plan.tp)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error

    def _experts(self, path: str, block: Experts, planned: BlockPlan) -> None:
        planned.output_is_partial = True
        parted = self.settings["expert_parallel"] and bool(block.index)
        for name, (split, dim) in self._present(path, block.tensors).items():
            self._tensor(f"{path}.{name}", even if parted else split, 0 if parted else dim, _NO_HEADS)
        once = self._present(path, dict.fromkeys(block.bias_shards))
        for name in once:
            self._tensor(f"{path}.{name}", even, 0 if parted else 1, _NO_HEADS)
        if parted:
            count = getattr(self.modules[path], block.count, None)
            if not isinstance(count, int):
                self.fail(f"{path} has no attribute {block.count!r} with the number of experts")
            implementation = getattr(getattr(self.modules[path], "config", None), "_experts_implementation", "eager")
            if implementation == "eager" and not block.eager_parts:
                self.fail(
                    f"expert_parallel: the forward of {path} knows no experts on other ranks; load the model with "
                    "experts_implementation='grouped_mm' (or 'batched_mm')"
                )
            if count < self.plan.tp:
                self.fail(f"expert_parallel: tp_size={self.plan.tp} is larger than the number of experts ({count})")
            ranges = even_ranges(count, self.plan.tp)
            planned.experts = block.index, ranges
            self.plan.attributes[path, block.count] = tuple(_count(r) for r in ranges)
            if hasattr(self.modules[path], "_is_expert_parallel"):  # transformers' grouped and batched forwards ask it
                self.plan.attributes[path, "_is_expert_parallel"] = (True,) * self.plan.tp
        else:
            planned.bias_shards = tuple(once)

    def _tensor(self, name: str, split: Split, dim: int, heads: HeadSplit) -> None:
        for claimed in self._below(name):
            shape = tuple(self.parameters[claimed].shape)
            try:
                self.claim(claimed, ParamLayout(shape, dim, split(shape[dim], self.plan.tp, heads)))
            except PolicyError as error:
                self.fail(f"{claimed}: {error}")

    def _sharded_norm(self, path: str, split: Split, heads: HeadSplit) -> None:
        self._tensor(f"{path}.weight", split, 0, heads)
        self.plan.sharded_norms[path] = self.parameters[f"{path}.weight"].shape[0]

    def _attributes(self, path: str, block: Block, heads: HeadSplit) -> None:
        for name, meaning in block.local_sizes.items():
            attribute = name.removesuffix("?")
            try:
                whole = operator.attrgetter(attribute)(self.modules[path])
            except AttributeError:
                if name.endswith("?"):
                    continue
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
                self.fail(f"local_sizes[{attribute!r}] = {meaning!r}; write one of {', '.join(counts)}")
            expected = {
                "q_heads": heads.q_heads, "kv_heads": heads.kv_heads, "groups": heads.q_heads // heads.kv_heads
            }.get(meaning, whole)  # fmt: skip
            if whole != expected:
                self.fail(f"{path}.{attribute} is {whole}, but by the config's head counts {meaning} is {expected}")
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
        if variants_of(path, module) != [path]:
            self.fail(
                f"{path} is in modules_to_save, which can be sharded of the embedding and the head; inside of blocks, "
                "LoRA can: put it in target_modules, or train it without PEFT"
            )
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
                for variant in variants_of(path, self.modules[path]):
                    self._vocabulary(variant, paths)

    def _vocabulary(self, path: str, paths: list[str]) -> None:
        module = self.modules[path]
        base = f"{path}.base_layer" if is_adapted(module) else path
        if f"{base}.weight" not in self.parameters:
            self.fail(
                f"{path} is wrapped by {type(module).__name__}; of PEFT's wrappers of an embedding or a head, LoRA and "
                "modules_to_save can be sharded"
            )
        weight = tuple(self.parameters[f"{base}.weight"].shape)
        parts, rows = vocabulary_rows(weight[0], self.plan.tp)
        layout = ParamLayout(weight, 0, parts, pad_to=rows)
        self.claim(f"{base}.weight", layout)
        if f"{base}.bias" in self.parameters:
            self.claim(f"{base}.bias", ParamLayout(weight[:1], 0, parts, pad_to=rows))
        paths.append(base)
        if is_adapted(module):
            plan_vocabulary_adapters(self, path, module, layout)

    def pair_blocks(self) -> None:
        """Find the layers whose two blocks share one residual addition."""
        pattern = self.policy.parallel_residual
        if not pattern or not self.policy.parallel_residual_if(self.config):
            return
        layers = list(self._matching(pattern))
        if not layers:
            self.fail(f"no module matches parallel_residual={pattern!r}")
        for layer in layers:
            blocks = [path for path in self.plan.blocks if path.startswith(f"{layer}.")]
            if len(blocks) != 2 or not all(self.plan.blocks[path].rows for path in blocks):
                self.fail(
                    f"parallel_residual={pattern!r}: {layer} has {len(blocks)} blocks; it must have two, each with a "
                    "row-parallel module"
                )
            self.plan.parallel_residual[layer] = blocks[0], blocks[1]

    def claim_replicated(self) -> None:
        unclaimed = []
        owned = {id(self.parameters[name]): layout for name, layout in self.plan.layouts.items()}
        for name, parameter in self.parameters.items():
            if name in self.plan.layouts or not self._in_sight(name):
                continue
            replicated = any(matches(pattern, part) for pattern in self.policy.replicated for part in prefixes(name))
            user = self.modules[name.rpartition(".")[0]]
            if id(parameter) in owned and not replicated and not isinstance(user, nn.Linear | nn.Embedding | Conv1D):
                # a second name in a module that does not compute with it (BERT's `cls.predictions.bias`)
                self.plan.layouts[name] = owned[id(parameter)]
                continue
            if not replicated and not (self.policy.rest_replicated and self._outside_blocks(name)):
                unclaimed.append(name)
            self.plan.layouts[name] = ParamLayout.replicated(parameter.shape, self.plan.tp)
        if unclaimed:
            shown = ", ".join(unclaimed[:5]) + (f" and {len(unclaimed) - 5} more" if len(unclaimed) > 5 else "")
            self.fail(
                f"nothing in the policy claims {shown}; name each in a block, in the vocabulary, or in `replicated`"
            )

    def _outside_blocks(self, name: str) -> bool:
        sharded = {*self.plan.blocks, *self.plan.embeddings, *self.plan.heads}
        return not any(prefix in sharded for prefix in prefixes(name))

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
        return (path for path in self.modules if self._in_sight(path) and matches(pattern, path))

    def _in_sight(self, path: str) -> bool:
        """Whether ``path`` lies in what this policy speaks of: below its root, in no tower."""
        inside = not self.root or path.startswith(f"{self.root}.")
        return inside and not any(f"{path}.".startswith(f"{tower}.") for tower in self.towers)

    def _has(self, path: str, name: str) -> bool:
        return not name or f"{path}.{name}" in self.modules or f"{path}.{name}" in self.parameters

    def _present(self, path: str, names: Mapping[str, T]) -> dict[str, T]:
        """The names that are there below ``path``, without the ``?`` of those that need not be."""
        return {
            name.removesuffix("?"): value
            for name, value in names.items()
            if not name.endswith("?") or self._has(path, name[:-1])
        }

    def _module_below(self, path: str, name: str) -> str:
        if f"{path}.{name}" not in self.modules:
            self.fail(f"there is no module {path}.{name}")
        return f"{path}.{name}"

    def _below(self, path: str) -> list[str]:
        names = [name for name in self.parameters if name == path or name.startswith(path + ".")]
        if not names and path not in self.modules:
            self.fail(f"there is no module or parameter {path!r}")
        return names

    def fail(self, reason: str) -> NoReturn:
        """Raise a PolicyError that names policy and model."""
        kind = type(self.modules[self.root]).__name__ + (f" ({self.root})" if self.root else "")
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
