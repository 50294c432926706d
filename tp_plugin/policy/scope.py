"""What one policy speaks of: the modules and parameters of a model or of one tower in it, and the plan they fill."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NoReturn, TypeVar

from torch import nn

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Policy
from tp_plugin.policy.layout import ParamLayout
from tp_plugin.policy.names import matches
from tp_plugin.policy.packed import codes_layout, is_packed
from tp_plugin.policy.plan import Plan

T = TypeVar("T")


class Scope:
    """The model or tower that ``policy`` speaks of. Everything that plans a part of it claims parameters here.

    Args:
        model: the whole model; only names and shapes are read, so it may be on the meta device.
        policy: the policy of the model, or of the tower at ``root``.
        config: the config from which the policy reads its counts.
        plan: where claims are collected; the towers of one model share it.
        root: path of the tower; empty for the model itself.
        expert_parallel: whether whole experts lie on the ranks, instead of a shard of each.
        leave_whole: model types of towers that every rank holds whole.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        config: object,
        plan: Plan,
        *,
        root: str = "",
        expert_parallel: bool = False,
        leave_whole: Collection[str] = (),
    ):
        self.model, self.policy, self.config, self.plan, self.root = model, policy, config, plan, root
        self.expert_parallel, self.leave_whole = expert_parallel, leave_whole
        self.modules = dict(model.named_modules())
        # remove_duplicate=False: a tied parameter has several names, and each must be claimed
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.towers: dict[str, str] = {}
        for pattern, name in policy.towers.items():
            self.towers |= dict.fromkeys(self.matching(pattern), name)

    def tower(self, path: str, policy: Policy, config: object) -> Scope:
        """The scope of ``policy`` in the tower at ``path``."""
        return Scope(
            self.model,
            policy,
            config,
            self.plan,
            root=path,
            expert_parallel=self.expert_parallel,
            leave_whole=self.leave_whole,
        )

    def claim(self, name: str, layout: ParamLayout) -> None:
        """Record the layout of parameter ``name``; each may be claimed once."""
        if name in self.plan.layouts:
            self.fail(f"{name} is claimed twice")
        self.plan.layouts[name] = layout

    def claim_replicated(self, path: str) -> list[str]:
        """Claim the parameter at ``path``, or all parameters of the module there, as replicated; their names."""
        names = self.below(path)
        for name in names:
            self.claim(name, self.whole(name))
        return names

    def whole(self, name: str) -> ParamLayout:
        """The layout of parameter ``name`` where every rank holds all of it."""
        module, tp = self.modules[name.rpartition(".")[0]], self.plan.tp
        if is_packed(module) and name.endswith(".weight"):
            return codes_layout(module, None, ((),) * tp)
        return ParamLayout.replicated(self.parameters[name].shape, tp)

    def matching(self, pattern: str) -> Iterator[str]:
        """Paths of the modules in scope that match ``pattern``."""
        return (path for path in self.modules if self.covers(path) and matches(pattern, path))

    def covers(self, path: str) -> bool:
        """Whether ``path`` is in scope: below the root, and in no tower."""
        inside = not self.root or path.startswith(f"{self.root}.")
        return inside and not any(f"{path}.".startswith(f"{tower}.") for tower in self.towers)

    def has(self, path: str, name: str) -> bool:
        """Whether there is a module or parameter ``name`` below ``path``."""
        return not name or f"{path}.{name}" in self.modules or f"{path}.{name}" in self.parameters

    def present(self, path: str, names: Mapping[str, T]) -> dict[str, T]:
        """The names to be found below ``path``, less the optional ones (``?``) that are absent; without the ``?``."""
        return {
            name.removesuffix("?"): value
            for name, value in names.items()
            if not name.endswith("?") or self.has(path, name[:-1])
        }

    def paths(self, path: str, names: Iterable[str]) -> list[str]:
        """Like :meth:`present`, as whole paths."""
        return [f"{path}.{name}" for name in self.present(path, dict.fromkeys(names))]

    def module(self, path: str) -> str:
        """``path``, which must be a module's."""
        if path not in self.modules:
            self.fail(f"there is no module {path}")
        return path

    def below(self, path: str) -> list[str]:
        """Names of the parameter at ``path`` or of all parameters of the module there."""
        names = [name for name in self.parameters if name == path or name.startswith(path + ".")]
        if not names and path not in self.modules:
            self.fail(f"there is no module or parameter {path!r}")
        return names

    def fail(self, reason: str) -> NoReturn:
        """Raise a PolicyError that names policy and model."""
        kind = type(self.modules[self.root]).__name__ + (f" ({self.root})" if self.root else "")
        raise PolicyError(f"the policy for {'/'.join(self.policy.model_types)} does not fit this {kind}: {reason}.")
