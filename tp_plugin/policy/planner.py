"""Policy + model + tp → what happens to every parameter. Reads shapes only, so it works on the meta device."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Policy
from tp_plugin.policy.derived_check import check_derived
from tp_plugin.policy.names import matches, prefixes
from tp_plugin.policy.plan import Plan
from tp_plugin.policy.plan_blocks import plan_block
from tp_plugin.policy.plan_vocabulary import plan_vocabulary
from tp_plugin.policy.registry import policy_for
from tp_plugin.policy.scope import Scope


def make_plan(
    model: nn.Module, policy: Policy, tp: int, *, expert_parallel: bool = False, leave_whole: Collection[str] = ()
) -> Plan:
    """What ``policy`` does to ``model`` on ``tp`` ranks.

    Args:
        expert_parallel: put whole experts on the ranks, instead of a shard of each.
        leave_whole: model types of towers that every rank holds whole.

    Raises:
        PolicyError: a module that the policy relies on is missing or of an unknown type, a count does not divide,
            a parameter is claimed by nothing, or there is no policy for a tower.
    """
    config = getattr(model, "config", None)
    scope = Scope(model, policy, config, Plan(tp), expert_parallel=expert_parallel, leave_whole=leave_whole)
    plan_scope(scope)
    _check_tied(scope)
    return scope.plan


def plan_scope(scope: Scope) -> None:
    """Claim every parameter of the model or tower."""
    plan_named(scope)
    replicate_rest(scope)
    if scope.policy.origin == "derived":
        check_derived(scope)
        if not scope.policy.proven:
            scope.plan.unproven += scope.policy.model_types


def plan_named(scope: Scope) -> None:
    """Claim what lies in towers, blocks and the vocabulary."""
    for path, name in scope.towers.items():
        _plan_tower(scope, path, name)
    for block in scope.policy.blocks:
        plan_block(scope, block)
    if scope.policy.vocabulary is not None:
        plan_vocabulary(scope, scope.policy.vocabulary)
    _pair_blocks(scope)


def _plan_tower(scope: Scope, path: str, name: str) -> None:
    config = getattr(scope.config, name, None)
    if config is None:
        scope.fail(f"{path} is a tower, but the model's config has no {name!r}")
    if config.model_type in scope.leave_whole:
        scope.claim_replicated(path)
        return
    try:
        policy = policy_for(config)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error
    plan_scope(scope.tower(path, policy, config))


def _pair_blocks(scope: Scope) -> None:
    """Find the layers whose two blocks share one residual addition."""
    pattern, plan = scope.policy.parallel_residual, scope.plan
    if not pattern or not scope.policy.parallel_residual_if(scope.config):
        return
    layers = list(scope.matching(pattern))
    if not layers:
        scope.fail(f"no module matches parallel_residual={pattern!r}")
    for layer in layers:
        blocks = [path for path in plan.blocks if path.startswith(f"{layer}.")]
        if len(blocks) != 2 or not all(plan.blocks[path].rows for path in blocks):
            scope.fail(
                f"parallel_residual={pattern!r}: {layer} has {len(blocks)} blocks; it must have two, each with a "
                "row-parallel module"
            )
        plan.parallel_residual[layer] = blocks[0], blocks[1]


def replicate_rest(scope: Scope) -> None:
    """Claim what the policy declares replicated; what nothing claims is an error."""
    policy, layouts = scope.policy, scope.plan.layouts
    unclaimed = []
    owned = {id(scope.parameters[name]): layout for name, layout in layouts.items()}
    rest = [name for name in scope.parameters if name not in layouts and scope.covers(name)]
    for name in rest:
        parameter = scope.parameters[name]
        replicated = any(matches(pattern, part) for pattern in policy.replicated for part in prefixes(name))
        user = scope.modules[name.rpartition(".")[0]]
        if id(parameter) in owned and not replicated and not isinstance(user, nn.Linear | nn.Embedding | Conv1D):
            # a second name in a module that does not compute with it (BERT's `cls.predictions.bias`)
            layouts[name] = owned[id(parameter)]
            continue
        if not replicated and not (policy.rest_replicated and _outside_blocks(scope.plan, name)):
            unclaimed.append(name)
        layouts[name] = scope.whole(name)
    if unclaimed:
        shown = ", ".join(unclaimed[:5]) + (f" and {len(unclaimed) - 5} more" if len(unclaimed) > 5 else "")
        scope.fail(f"nothing in the policy claims {shown}; name each in a block, in the vocabulary, or in `replicated`")


def _outside_blocks(plan: Plan, name: str) -> bool:
    sharded = {*plan.blocks, *plan.embeddings, *plan.heads}
    return not any(prefix in sharded for prefix in prefixes(name))


def _check_tied(scope: Scope) -> None:
    first: dict[int, str] = {}
    for name, parameter in scope.parameters.items():
        other = first.setdefault(id(parameter), name)
        if scope.plan.layouts[other] != scope.plan.layouts[name]:
            scope.fail(f"{other} and {name} are one tied parameter but would be sharded differently")
