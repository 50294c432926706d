"""What a rank holds of weights, gradients and optimizer states: the layout record, and each engine's partition rule.

With ``w`` bytes of a weight as the model is loaded, N elements on this rank of the TP group, T of them trained, dp
replicas; all of the engines' own rules, as of DeepSpeed 0.19, torch 2.13 and Accelerate 1.15:

    engine   weights           gradients    optimizer                          beside it
    ddp      w N               w T          states in w                        w T of buckets, if dp > 1
    zero1/2  w N               w T / dp     4 T / dp copy, states / dp in 4    two buckets
    zero3    w N / dp          w T / dp     4 T / dp copy, states / dp in 4    what stays gathered: max_live_parameters
    fsdp2    v N / dp          v T / dp     states / dp in v                   the root's weights, two layers, their
                                                                               gradients; v = 4 with mixed precision

At dp = 1 nothing is split. AdamW's states are two of a weight's size, in 8 bits two bytes; Adafactor's one number for a
row and one for a column of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from tp_plugin.policy import Plan

BUCKET = 500_000_000
"""Elements of DeepSpeed's ``reduce_bucket_size`` where none is given."""
LIVE = 1_000_000_000
"""Elements of its ``stage3_max_live_parameters`` likewise."""

NF4 = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits, with a scale in fp32 for each 64."""

Place = tuple[str, int]
"""``(path of a stack, number)`` of a layer; ``("", 0)`` in front of the stacks, ``("", 1)`` behind them."""


@dataclass(frozen=True)
class Held:
    """A parameter on a rank.

    Attributes:
        places: where it is used: two if it is tied.
        shape: of what this rank of the TP group holds.
        size: bytes of an element.
        trained: whether it has a gradient.
    """

    places: tuple[Place, ...]
    shape: tuple[int, ...]
    size: float
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def share(self, dp: int) -> int:
        """Elements on the fullest of ``dp`` replicas that split its rows, as FSDP2 does."""
        return self.numel if not self.shape else -(-self.shape[0] // dp) * math.prod(self.shape[1:])


def held_parameters(model: nn.Module, plan: Plan, stacks_of: Iterable[str], quantized: bool = False) -> list[Held]:
    """What rank 0 of the TP group holds of ``model``, which is whole (and may be on the meta device)."""
    embeddings: set[int] = set()
    if hasattr(model, "get_input_embeddings") and (embedding := _embedding(model)) is not None:
        embeddings = {id(p) for p in embedding.parameters()}
    stacks, behind = tuple(stacks_of), False
    found: dict[int, Held] = {}
    linears = {f"{path}.weight" for path in (*plan.columns, *plan.rows)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is not None:
            behind = True
            place = stack, int(name[len(stack) + 1 :].partition(".")[0])
        else:
            place = "", int(behind and not (id(parameter) in embeddings and "embed" in name))
        if id(parameter) in found:
            before = found[id(parameter)]
            places = before.places if place in before.places else (*before.places, place)
            found[id(parameter)] = Held(places, before.shape, before.size, before.trained)
            continue
        size: float = parameter.element_size()
        if quantized and name in linears and not parameter.requires_grad and "lora_" not in name:
            size = NF4
        found[id(parameter)] = Held((place,), plan.layouts[name].local_shape(0), size, parameter.requires_grad)
    return list(found.values())


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (NotImplementedError, AttributeError):
        return None


@dataclass
class States:
    """Bytes that stay from step to step, and what an engine needs beside."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0


def states(held: list[Held], engine: str, dp: int, optimizer: str, mixed: bool, bucket: int = BUCKET) -> States:
    """Of the parameters of one stage.

    Args:
        mixed: FSDP2 keeps its shards in fp32 (Accelerate's ``mixed_precision``).
        bucket: elements of one of DeepSpeed's buckets.
    """
    found = States()
    trained = [p for p in held if p.trained]
    size = max((p.size for p in trained), default=2.0)
    count = sum(p.numel for p in trained)
    if engine == "fsdp2":
        found.weights = sum(p.share(dp) * _kept(p, mixed) for p in held)
        found.gradients = sum(p.share(dp) * _kept(p, mixed) for p in trained)
        found.optimizer = sum(_moments(p, optimizer, p.share(dp), _kept(p, mixed)) for p in trained)
    elif engine == "ddp":
        found.weights = sum(p.numel * p.size for p in held)
        found.gradients = sum(p.numel * p.size for p in trained)
        found.optimizer = sum(_moments(p, optimizer, p.numel, p.size) for p in trained)
        found.buffers = found.gradients if dp > 1 else 0.0
    else:
        split = dp if engine == "zero3" else 1
        found.weights = sum(p.numel * p.size for p in held) / split
        found.gradients = count * size / dp
        found.optimizer = count * 4 / dp + sum(_moments(p, optimizer, p.numel / dp, 4) for p in trained)
        if dp > 1:
            found.buffers = 2 * min(bucket, count) * size
            found.buffers += min(sum(p.numel * p.size for p in held), LIVE * size) if engine == "zero3" else 0
    return found


def _kept(parameter: Held, mixed: bool) -> float:
    return 4.0 if mixed and parameter.trained else parameter.size


def _moments(parameter: Held, optimizer: str, numel: float, size: float) -> float:
    if optimizer == "adamw":
        return 2 * size * numel
    if optimizer == "adamw_8bit":
        return 2 * numel * (1 + 4 / 256)  # a scale in fp32 for each 256
    shape = parameter.shape
    if len(shape) < 2:
        return 4 * numel
    return 4 * numel / max(parameter.numel, 1) * math.prod(shape[:-2]) * (shape[-2] + shape[-1])
