"""Experts whose weights are stacked in tensors: a shard of each on every rank, or whole experts on the ranks."""

from __future__ import annotations

from tp_plugin.policy.blocks import Experts
from tp_plugin.policy.plan import BlockPlan
from tp_plugin.policy.plan_weights import plan_tensor
from tp_plugin.policy.scope import Scope
from tp_plugin.policy.split import NO_HEADS, even, even_ranges


def is_expert_parallel(scope: Scope, block: Experts) -> bool:
    """Whether whole experts of ``block`` lie on the ranks."""
    return scope.expert_parallel and bool(block.index)


def plan_experts(scope: Scope, path: str, block: Experts, planned: BlockPlan) -> None:
    """Claim the tensors of the experts at ``path``, whose output is a partial sum on every rank."""
    planned.output_is_partial = True
    parallel = is_expert_parallel(scope, block)
    for name, (split, dim) in scope.present(path, block.tensors).items():
        plan_tensor(scope, f"{path}.{name}", even if parallel else split, 0 if parallel else dim, NO_HEADS)
    biases = scope.present(path, dict.fromkeys(block.bias_shards))
    for name in biases:
        plan_tensor(scope, f"{path}.{name}", even, 0 if parallel else 1, NO_HEADS)
    if parallel:
        _distribute(scope, path, block, planned)
    else:
        planned.bias_shards = tuple(biases)


def _distribute(scope: Scope, path: str, block: Experts, planned: BlockPlan) -> None:
    """Give each rank a range of whole experts."""
    module, tp = scope.modules[path], scope.plan.tp
    count = getattr(module, block.count, None)
    if not isinstance(count, int):
        scope.fail(f"{path} has no attribute {block.count!r} with the number of experts")
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", "eager")
    if implementation == "eager" and not block.eager_supports_ep:
        scope.fail(
            f"expert_parallel: the forward of {path} knows no experts on other ranks; load the model with "
            "experts_implementation='grouped_mm' (or 'batched_mm')"
        )
    if count < tp:
        scope.fail(f"expert_parallel: tp_size={tp} is larger than the number of experts ({count})")
    ranges = even_ranges(count, tp)
    planned.experts = block.index, ranges
    scope.plan.attributes[path, block.count] = tuple(stop - start for start, stop in ranges)
    if hasattr(module, "_is_expert_parallel"):  # transformers' grouped and batched forwards ask it
        scope.plan.attributes[path, "_is_expert_parallel"] = (True,) * tp
