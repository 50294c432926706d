"""Which layers of a model run back to back on the same hidden states, for sequence parallelism."""

from __future__ import annotations

import re

from torch import nn

from tp_plugin.errors import PolicyError
from tp_plugin.policy.plan import Plan

TOKENWISE = re.compile(r"Norm|Scale|^Linear$|^Dropout$")
"""Classes of modules with parameters that treat every token by itself."""


def stacks(model: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """Path of a stack (an ``nn.ModuleList``) → paths of its layers, in order.

    Raises:
        PolicyError: something in a layer needs more than its own tokens, or it cannot be told.
    """
    found: dict[str, list[str]] = {}
    for block, planned in plan.blocks.items():
        numbered = re.match(r"(.*)\.(\d+)(?:\.|$)", block)
        if numbered is None:
            raise PolicyError(f"sequence_parallel: {block} is in no list of layers; turn sequence_parallel off")
        if planned.output_is_partial:
            raise PolicyError(f"sequence_parallel: {block} is a mixture of experts, whose router must see all tokens")
        found.setdefault(numbered[1], [])
    for stack in found:
        layers = model.get_submodule(stack)
        found[stack] = [f"{stack}.{name}" for name, _ in layers.named_children()]
        for layer in found[stack]:
            _check_layer(layer, model.get_submodule(layer), plan)
    return found


def _check_layer(path: str, layer: nn.Module, plan: Plan) -> None:
    inside = [block for block in plan.blocks if block != path]
    # blocks that are no module of their own have their linears beside the layer's norms
    linears = {*plan.columns, *plan.rows}
    for name, module in layer.named_modules(prefix=path):
        in_block = name in linears or any(name == block or name.startswith(f"{block}.") for block in inside)
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if has_parameters and not in_block and not TOKENWISE.search(type(module).__name__):
            raise PolicyError(
                f"sequence_parallel: {name} ({type(module).__name__}) stands outside the blocks and may need more than "
                "this rank's tokens; turn sequence_parallel off for this architecture"
            )


def between(plan: Plan, layers: list[str]) -> set[str]:
    """Parameters of these layers that every rank has whole and uses on its own tokens: their gradients are summed."""
    inside = tuple(f"{layer}." for layer in layers)
    return {name for name, layout in plan.layouts.items() if name.startswith(inside) and not layout.is_sharded}
