"""The two ends of a block: f at its inputs, g behind its row-parallel product, and the random stream between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Group
from tp_plugin.policy import BlockPlan
from tp_plugin.policy.layout import Range
from tp_plugin.tensor import regions, rng, sequence
from tp_plugin.tensor.arguments import Arguments
from tp_plugin.tensor.bypass_check import BypassCheck
from tp_plugin.tensor.parallel_residual import ParallelResidual
from tp_plugin.tensor.wgrad_overlap import BlockInput
from tp_plugin.tensor.whole_masks import Cuts, attends_elsewhere


class ParallelBlock:
    """The two ends of one block: ``f`` at its inputs, ``g`` behind it, and the random stream between them.

    Args:
        path: the block's path in the model (it enters the seeds of its random stream).
        plan: how the block communicates.
        positions: position of every argument of the forward of the block's entry.
        group: the TP group.
        cuts: how the tensors inside are split that dropouts act on; None: each rank draws masks of its own.

    Attributes:
        block_input: the node at which the block begins; shared by the two blocks of a parallel residual.
        residual: the parallel residual that the block belongs to.
        stack: the stack of layers whose tokens are split, under sequence parallelism.
        layer_region: the random stream of the layer around the block then.
        bypass: the check of a block whose inputs are not named.
    """

    def __init__(self, path: str, plan: BlockPlan, positions: dict[str, int], group: Group, cuts: Cuts | None):
        self.path, self.plan, self.positions, self.group = path, plan, positions, group
        self.region = rng.ShardedRegion(path, group.rank, cuts)
        self.block_input = BlockInput(group)
        self.residual: ParallelResidual | None = None
        self.stack: sequence.Stack | None = None
        self.layer_region: rng.ShardedRegion | None = None
        self.regather: sequence.Regather | None = None
        self.bypass = BypassCheck(path) if "*" in plan.inputs and group.size > 1 else None
        self._draws = rng.Dropouts()
        self._to_come = 0
        self._inside = False
        self._others_keep = True

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook (with kwargs) of the block's entry."""
        self._inside = True
        arguments = Arguments(args, kwargs, self.positions)
        entering = arguments.inputs(self.plan.inputs)
        entered: Sequence[torch.Tensor]
        if self.residual is not None and len(entering) == 1:
            entered = [self.residual.enter(tensor) for tensor in entering.values()]
        elif self.on_own_tokens:
            first, *others = entering.values()  # a cross-attention's other input is whole
            if others and self.bypass is not None:
                raise TPError(
                    f"sequence_parallel: {self.path} takes {len(entering)} differentiable inputs, and its derived "
                    "policy does not say which of them are split along the sequence; turn sequence_parallel off, or "
                    "write a policy (docs, 'Add an architecture')"
                )
            entered = [self._gather(first), *regions.copy_all_to_tp(others, self.group)]
        else:
            entered = self.block_input.enter(list(entering.values()), None)
        for place, tensor in zip(entering, entered, strict=True):
            arguments.replace(place, tensor)
        if self.bypass is not None:
            self.bypass.enter(entered)
        for name, (dim, heads, ranges) in self.plan.head_inputs.items():
            bias = arguments.tensor(name)
            if bias is not None:
                (start, stop), at = ranges[self.group.rank], bias.dim() + dim
                mine = regions.copy_to_tp(bias, self.group)
                if mine.shape[at] > 1:  # else one for all heads
                    mine = mine.unflatten(at, (-1, heads)).narrow(at + 1, start, stop - start).flatten(at, at + 1)
                arguments.put(name, mine)
        if self.plan.experts is not None:
            self._local_experts(arguments, *self.plan.experts)
        if entering:
            self._begin(module, next(iter(entering.values())).device)
        return tuple(arguments.args), arguments.kwargs

    def _local_experts(self, arguments: Arguments, name: str, ranges: tuple[Range, ...]) -> None:
        """Experts' numbers → this rank's; those of other ranks become the number after the last, which is no expert."""
        numbers = arguments.tensor(name)
        assert numbers is not None
        start, stop = ranges[self.group.rank]
        elsewhere = (numbers < start) | (numbers >= stop)
        arguments.put(name, (numbers - start).masked_fill(elsewhere, stop - start))

    def start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a block's module that begins at modules below."""
        self._inside = True
        self._to_come = len(self.plan.input_of) + len(self.plan.output_of)

    def enter_linear(self, block: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a module below at whose input the block begins."""
        return (self._enter_below(block, args[0]), *args[1:])

    def enter_output(self, block: nn.Module, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a module below at whose output the block begins."""
        return self._enter_below(block, output)

    def _enter_below(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self._inside = True  # a layer is recomputed without its hooks
        self._to_come -= 1
        if self._to_come <= 0:  # what runs before the last of several beginnings is replicated
            self._begin(block, x.device)
        if len(self.plan.input_of) + len(self.plan.output_of) > 1:
            return sequence.enter(x, self.stack, self.group)
        if self.on_own_tokens and self.plan.input_of:
            return self._gather(x)
        return self.block_input.enter([x], self.stack)[0]

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        assert self.stack is not None
        regathers = self.stack.regathers
        (entered,) = self.block_input.enter([x], self.stack, regathers)
        self.regather = self.stack.keep(x, entered, self._others_keep) if regathers else None
        if self.block_input.run is not None:
            self.block_input.run.regather = self.regather
        return entered

    def _begin(self, module: nn.Module, device: torch.device) -> None:
        # on parts of the sequence the whole layer has this rank's own random stream, if it draws from its own
        if module.training and (self.region.nests or not self.on_own_tokens) and self._draws(module):
            attention = self.region.nests and self.plan.heads is not None
            self.region.begin(device, own=attention and attends_elsewhere(module))

    @property
    def on_own_tokens(self) -> bool:
        """Whether this rank has a part of the tokens outside of the block."""
        return self.stack is not None and self.stack.runs

    @property
    def stream(self) -> rng.ShardedRegion:
        """The random stream that the inside of the block draws from."""
        if self.on_own_tokens and self.layer_region is not None and not self.region.is_open:
            return self.layer_region
        return self.region

    def sum_output(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a module whose output is this rank's part of a sum."""
        self.end()
        return sequence.reduce(output, self.stack, self.group)

    def reduce(self, product: torch.Tensor, bias: torch.Tensor | None, fresh: bool) -> torch.Tensor:
        """``g`` behind the block's row-parallel product (``fresh``: nobody has seen it), and the bias, once."""
        self.end()
        if self.residual is not None and self.residual.merging:
            return self.residual.reduce(product, bias)
        fresh = fresh and (self.bypass is None or self.bypass.done)  # which looks for the sum's own node
        y = sequence.reduce(product, self.stack, self.group, fresh)
        return y if bias is None else y + bias.to(y.dtype)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook (always called): a block that raised must not leave the sharded random stream on."""
        self.end()
        if self.bypass is not None:
            self.bypass.leave(output)

    def end(self) -> None:
        """Behind the block's sharded part; again at the end of the block."""
        if not self._inside:
            return
        self._inside = False
        self.region.end()
        if self.residual is None:
            self.block_input.end()
        if self.regather is not None:
            # a model does not change once it is sharded, so that none will keep it where none has
            self._others_keep = self.regather.end()
            self.regather = None
