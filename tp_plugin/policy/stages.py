"""Which pipeline stage runs what of one model: plain data, and the split that balances the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from tp_plugin.errors import PolicyError
from tp_plugin.policy.plan import Plan


@dataclass(frozen=True)
class Stages:
    """How one model is cut.

    Attributes:
        stack: path of the ``nn.ModuleList`` of the layers.
        first_layers: number of each stage's first layer, then the number of all layers.
        before, after: paths of the modules with parameters that run before the first and after the last layer.
        returns_tuples: whether layers return tuples, whose first entry is the hidden state.
        parameters: name → the stages that hold it; two for a weight that is tied.
    """

    stack: str
    first_layers: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    returns_tuples: bool
    parameters: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many stages."""
        return len(self.first_layers) - 1

    def layers(self, stage: int) -> range:
        """Numbers of the layers of ``stage``."""
        return range(self.first_layers[stage], self.first_layers[stage + 1])

    def of(self, path: str) -> tuple[int, ...]:
        """The stages that hold a parameter of that name, or run the module of that path: all, without parameters."""
        if path in self.parameters:
            return self.parameters[path]
        if path.startswith(f"{self.stack}."):
            layer = int(path.removeprefix(f"{self.stack}.").split(".")[0])
            return (next(stage for stage in range(self.count) if layer in self.layers(stage)),)
        below = {stage for name, on in self.parameters.items() if name.startswith(f"{path}.") for stage in on}
        return tuple(sorted(below)) or tuple(range(self.count))


def balanced(costs: Sequence[float], first: float, last: float, stages: int) -> tuple[int, ...]:
    """The cut of layers with these ``costs`` whose dearest stage is the cheapest, as :attr:`Stages.first_layers`.

    Args:
        costs: of each layer, in any unit.
        first, last: what the first stage has besides, and the last.
        stages: at least one, at most one for each layer.

    Among equal cuts, the one whose costs are most even (least sum of squares), then the one with later cuts.
    """
    sums = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(stages):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in range(stage + 1, len(costs) - (stages - 1 - stage) + 1):
            options = [
                (max(most, here := cost(stage, start, stop)), squares + here**2, (*cuts, stop))
                for start, (most, squares, cuts) in best.items()
                if start < stop
            ]
            found[stop] = min(options, key=lambda option: (option[0], option[1], [-cut for cut in option[2]]))
        best = found
    return best[len(costs)][2]


def chosen(layers: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The cut into stages of these ``sizes``.

    Raises:
        PolicyError: they are not all the layers.
    """
    if sum(sizes) != layers:
        raise PolicyError(
            f"tp_plugin.pipeline_split: {list(sizes)} are {sum(sizes)} layers, but the model has {layers}; write as "
            "many in all, or `auto`"
        )
    return (0, *accumulate(sizes))


def on_stage(plan: Plan, stages: Stages, stage: int) -> Plan:
    """What of ``plan`` concerns the modules that ``stage`` runs; the layouts are those of the whole model."""

    def here(path: str) -> bool:
        return stage in stages.of(path)

    return replace(
        plan,
        blocks={path: block for path, block in plan.blocks.items() if here(path)},
        parallel_residual={path: pair for path, pair in plan.parallel_residual.items() if here(path)},
        rows=[path for path in plan.rows if here(path)],
        columns=[path for path in plan.columns if here(path)],
        attributes={at: values for at, values in plan.attributes.items() if here(at[0])},
        sharded_norms={path: width for path, width in plan.sharded_norms.items() if here(path)},
        embeddings=[path for path in plan.embeddings if stage == 0],
        heads=[path for path in plan.heads if stage == stages.count - 1],
        adapted_embeddings=[at for at in plan.adapted_embeddings if stage == 0],
        adapters={path: adapter for path, adapter in plan.adapters.items() if here(path)},
        magnitudes={path: kind for path, kind in plan.magnitudes.items() if here(path)},
        dropouts={path: kind for path, kind in plan.dropouts.items() if here(path)},
    )


def sizes_of(stages: Stages) -> list[int]:
    """How many layers each stage has."""
    return [stop - start for start, stop in pairwise(stages.first_layers)]
