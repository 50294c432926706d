"""Where a model can be cut into pipeline stages: found by running it once on the meta device, without numbers.

The order of modules in a run says what comes before, between and after the layers; autograd says what reaches a layer
beside the hidden state. What a pipeline cannot carry is refused, named by what was found, before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import PolicyError
from tp_plugin.policy import Plan
from tp_plugin.policy.stages import Stages, balanced, chosen
from tp_plugin.shard.quantized import packed_in
from tp_plugin.tensor.pipeline.holes import meta_twin

ROWS, TOKENS = 2, 6


def find_stages(model: nn.Module, plan: Plan, count: int, sizes: Sequence[int] = ()) -> Stages:
    """How ``model`` is cut into ``count`` stages, with ``sizes`` layers each if they are given.

    Raises:
        PolicyError: it cannot be cut, and why.
    """
    stack = _stack(model, plan)
    layers = list(model.get_submodule(stack).children())
    if len(layers) < count:
        raise PolicyError(f"pp_size={count}: {type(model).__name__} has {len(layers)} layers; write pp_size: 1")
    for path, module in model.named_modules():
        if getattr(module, "layerdrop", 0):
            raise _refused(model, f"{path or 'it'} leaves out layers at random (layerdrop), each stage others")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _refused(model, f"{path} takes statistics of the whole batch, which is cut into micro-batches")
    run = _traced(model, stack, len(layers))
    before, after, within = (_with_parameters(model, paths) for paths in (run.before, run.after, run.within))
    if both := [path for path in before if path in after]:
        raise _refused(model, f"{', '.join(both)} run before its layers and after them")
    if between := [path for path in within if path not in (*before, *after)]:
        raise _refused(model, f"{', '.join(between)} run between its layers, which stand on different stages")
    costs = [_cost(layer) for layer in layers]
    last = sum(_cost(model.get_submodule(path)) for path in after)
    cuts = chosen(len(layers), sizes) if sizes else balanced(costs, 0.0, last, count)
    return Stages(stack, cuts, before, after, run.returns_tuples, _parameters(model, stack, cuts, before, after))


def _parameters(
    model: nn.Module, stack: str, cuts: Sequence[int], before: Sequence[str], after: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {}
    last = len(cuts) - 2
    for aliases in names.values():
        stages = set()
        for name in aliases:
            if name.startswith(f"{stack}."):
                layer = int(name.removeprefix(f"{stack}.").split(".")[0])
                stages.add(next(stage for stage in range(last + 1) if layer < cuts[stage + 1]))
            elif any(name.startswith(f"{path}.") for path in before):
                stages.add(0)
            elif any(name.startswith(f"{path}.") for path in after):
                stages.add(last)
        if not stages:
            raise _refused(model, f"parameter {aliases[0]!r} is in no module that runs before, in or after its layers")
        found.update(dict.fromkeys(aliases, tuple(sorted(stages))))
    return found


def _refused(model: nn.Module, why: str) -> PolicyError:
    return PolicyError(f"{type(model).__name__} cannot be cut into pipeline stages: {why}. Write pp_size: 1")


def _stack(model: nn.Module, plan: Plan) -> str:
    numbered = (re.match(r"(.*)\.(\d+)(?:\.|$)", block) for block in plan.blocks)
    found = sorted({match[1] for match in numbered if match is not None})
    if len(found) != 1:
        raise _refused(model, f"it has {len(found)} stacks of layers ({', '.join(found) or 'none'}), and needs one")
    return found[0]


def _cost(module: nn.Module) -> float:
    """Multiplications per token, up to a factor: one for each element of a matrix."""
    packed: dict[int, float] = {id(one.weight): one.out_features * one.in_features for _, one in packed_in(module)}
    # of stacked experts, a token sees a few: one in eight is what mixtures of today choose, or fewer
    return sum(packed.get(id(p), p.numel() / (8 if p.dim() == 3 else 1)) for p in module.parameters() if p.dim() > 1)


def _with_parameters(model: nn.Module, paths: list[str]) -> tuple[str, ...]:
    """Those with parameters; what is inside another one of them goes with it."""
    having = [path for path in dict.fromkeys(paths) if next(model.get_submodule(path).parameters(), None) is not None]
    return tuple(path for path in having if not any(path.startswith(f"{outer}.") for outer in having))


@dataclass
class _Run:
    """The order in which the modules of one forward began."""

    before: list[str] = field(default_factory=list)
    within: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    ended: int = 0
    returns_tuples: bool = False
    problem: str = ""
    output: Any = None


def _traced(model: nn.Module, stack: str, count: int) -> _Run:
    traced = _on_meta(model, stack)
    run = _Run()
    for path, module in traced.named_modules():
        if re.fullmatch(rf"{re.escape(stack)}\.\d+", path):
            number = int(path.rpartition(".")[2])
            module.register_forward_pre_hook(_layer_begins(run, path, number), with_kwargs=True)
            module.register_forward_hook(_layer_ends(run))
        elif not f"{stack}.".startswith(f"{path}." if path else "") and not path.startswith(f"{stack}."):
            module.register_forward_pre_hook(_begins(run, path, count))
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            traced(**_inputs(traced))
    except Exception as error:
        raise _refused(
            model,
            f"its forward does not run on the meta device ({type(error).__name__}: {error}), where it is looked at",
        ) from error
    if run.ended < count:
        run.problem = run.problem or f"of its {count} layers {run.ended} ran in a forward"
    if run.problem:
        raise _refused(model, run.problem)
    return run


def _begins(run: _Run, path: str, count: int) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        where = run.before if run.output is None and not run.ended else run.after if run.ended == count else run.within
        where.append(path)

    return hook


def _layer_begins(run: _Run, path: str, number: int) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if number != run.ended:
            run.problem = run.problem or f"its layers run in another order than they stand ({path})"
        if run.output is not None and hidden is not run.output:
            run.problem = run.problem or f"{path} does not get the very output of the layer before it"
        run.output = hidden
        others = [*((str(at), value) for at, value in enumerate(args[1:], 1)), *kwargs.items()]
        learned = [
            name for name, value in others if value is not hidden and any(t.requires_grad for t in _tensors(value))
        ]
        if learned:
            run.problem = run.problem or f"{path} gets {', '.join(learned)} beside the hidden state, with a gradient"

    return hook


def _layer_ends(run: _Run) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        run.ended += 1
        run.returns_tuples |= isinstance(output, tuple)
        run.output = output[0] if isinstance(output, tuple) else output
        return (run.output,) if isinstance(output, tuple) else output  # all that a layer of another stage has

    return hook


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return [tensor for one in value.values() for tensor in _tensors(one)] if isinstance(value, dict) else []


def _on_meta(model: nn.Module, stack: str) -> Any:
    """A copy of the model's structure, whose tensors are shapes."""
    traced = meta_twin(model).eval()
    vars(traced).pop("forward", None)  # a patched one may call the model itself, not the copy
    for module in traced.get_submodule(stack).modules():
        if any(parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False)):
            module.forward = _experts  # grouped products take not all shapes and dtypes on the meta device
    return traced


def _experts(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states * 1


def _inputs(model: Any) -> dict[str, Any]:
    config = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = ROWS, getattr(config, "num_channels", 3), *sides
        return {"pixel_values": torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")}
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    ids = torch.zeros(ROWS, int(min(TOKENS, positions)), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.can_generate():  # with a cache it is not looked for packed sequences, which needs numbers
        inputs["use_cache"] = True
    return inputs
