"""The peak of a rank: its states, and a micro-batch walked through segment by segment as the trace has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tp_plugin.estimate.hardware import GIB, Gpu
from tp_plugin.estimate.job import Layout, Memory
from tp_plugin.estimate.states import Held, Place, states
from tp_plugin.estimate.trace import Key, Segment, Trace

CONTEXT = 0.4 * GIB
"""What CUDA and its libraries take beside the allocator; 0.3 to 0.5 GiB were measured."""
COMMUNICATOR = 0.5 * GIB
"""What each of NCCL's communicators takes."""
FRAGMENTS = 0.06
"""What an allocator holds at most beyond what is alive, as a share of it."""
USABLE = 0.95
"""Of a GPU's memory: beyond it runs were seen to thrash, two to three times slower."""


def scaled(segment: Segment, batch: int) -> Segment:
    """The segment of a micro-batch that is ``batch`` times as large as the traced one."""
    made = segment.gradients
    return replace(
        segment,
        kept=segment.kept * batch,
        peak=max(segment.peak - made, 0) * batch + made,
        output=segment.output * batch,
    )


def checkpointed(trace: Trace) -> Trace:
    """The same step with gradient checkpointing: a layer keeps its output, and runs again before its backward."""
    ahead = {key: segment for key, segment in trace.forward if key[0]}
    forward = [
        (key, replace(s, kept=s.output, peak=max(s.output, s.peak)) if key[0] else s) for key, s in trace.forward
    ]
    backward = []
    for key, segment in trace.backward:
        if key in ahead:
            first = ahead[key]
            again = first.kept - first.output
            segment = replace(
                segment, kept=segment.kept + again, peak=max(first.peak - first.output, again + segment.peak)
            )
        backward.append((key, segment))
    return Trace(forward, backward)


def part_of_stage(found: list[tuple[Key, Segment]], stage: range, first: bool, last: bool) -> list[tuple[Key, Segment]]:
    """The segments of one pipeline stage: its layers, what is in front of the first, and behind the last."""
    ends = max((number for (path, number), _ in found if not path), default=0)
    return [
        (key, segment) for key, segment in found if (key[1] in stage if key[0] else (last if key[1] == ends else first))
    ]


def in_stage(place: Place, stage: range, first: bool, last: bool) -> bool:
    """Whether what stands at ``place`` is on the stage."""
    return place[1] in stage if place[0] else (last if place[1] else first)


def activations(trace: Trace, in_flight: int, *, grow: bool) -> tuple[float, float]:
    """Bytes kept by one micro-batch, and the peak of all beyond the states.

    Args:
        in_flight: micro-batches that have gone forward when the first goes back.
        grow: gradients are made in this backward and stay; else they stand in the states.
    """
    kept = sum(segment.kept for _, segment in trace.forward)
    live = top = float(kept * (in_flight - 1))
    for _, segment in (*trace.forward, *trace.backward):
        top = max(top, live + segment.peak)
        live += segment.kept + (segment.gradients if grow else 0)
    return float(kept), max(top, live)


def layers_of_stage(count: int, pp: int, stage: int) -> range:
    """The layers of a stage; the first stages have one more where pp does not divide them."""
    base, more = divmod(count, pp)
    start = stage * base + min(stage, more)
    return range(start, start + base + (stage < more))


def memory(
    trace: Trace, held: list[Held], layout: Layout, optimizer: str, *, mixed: bool, layers: int, gpu: Gpu | None = None
) -> Memory:
    """Of the fullest stage.

    Args:
        trace: of one sequence.
        gpu: what the run is on; None for the CPU, whose allocator holds nothing beside.
    """
    found = [
        of_stage(trace, held, layout, optimizer, mixed, layers_of_stage(layers, layout.pp, s), s, gpu)
        for s in range(layout.pp)
    ]
    return max(found, key=lambda each: each.high)


def of_stage(
    trace: Trace,
    held: list[Held],
    layout: Layout,
    optimizer: str,
    mixed: bool,
    layers: range,
    stage: int,
    gpu: Gpu | None,
) -> Memory:
    """Of one stage, which has ``layers``."""
    first, last = stage == 0, stage == layout.pp - 1
    mine = [p for p in held if any(in_stage(place, layers, first, last) for place in p.places)]
    fixed = states(mine, layout.engine, layout.dp, optimizer, mixed)
    step = checkpointed(trace) if layout.checkpointing else trace
    step = Trace(*(
        [(key, scaled(s, layout.micro_batch)) for key, s in part_of_stage(part, layers, first, last)]
        for part in (step.forward, step.backward)
    ))  # fmt: skip
    in_flight = min(layout.pp - stage, layout.accumulation)
    # under DDP and without replicas gradients lie where the backward makes them
    grow = layout.accumulation == 1 and (layout.engine == "ddp" or layout.dp == 1)
    kept, peak = activations(step, in_flight, grow=grow)
    gathered = _gathered(mine, layout) if layout.engine == "fsdp2" and layout.dp > 1 else 0.0
    parts = {
        "weights": fixed.weights,
        "gradients": fixed.gradients if not grow else 0.0,
        "optimizer": fixed.optimizer,
        "buffers": fixed.buffers,
        "activations": kept * in_flight,
        "loss and temporaries": max(peak - kept * in_flight, 0.0),
        "gathered": gathered,
    }
    if grow:  # what the peak has of them is their part; they are there after it in any case
        made = sum(segment.gradients for _, segment in step.backward)
        parts["gradients"] = min(made, parts["loss and temporaries"])
        parts["loss and temporaries"] -= parts["gradients"]
    total = sum(parts.values())
    if gpu is None:
        return Memory(parts, total, total, stage)
    communicators = sum((layout.tp > 1, layout.dp > 1, layout.pp > 1)) * COMMUNICATOR
    parts["context"] = CONTEXT + communicators
    # a collective's tensors stay reserved while the host runs ahead of the device
    ahead = (
        2 * sum(size for _, s in step.forward for (_, size), n in s.sent.items() for _ in range(n))
        if layout.tp > 1
        else 0
    )
    low = total + CONTEXT
    high = (total + 0.5 * ahead) * (1 + FRAGMENTS) + CONTEXT + communicators
    return Memory(parts, low, high, stage)


def _gathered(mine: Iterable[Held], layout: Layout) -> float:
    """FSDP2's whole weights: the root's all the time, of the layers the one that runs and the one to come."""
    layers: dict[Place, float] = {}
    root = 0.0
    for p in mine:
        if p.places[0][0]:
            layers[p.places[0]] = layers.get(p.places[0], 0.0) + p.numel * p.size
        else:
            root += p.numel * p.size
    return root + 2 * max(layers.values(), default=0.0)


def verdict(found: Memory, gpu: Gpu) -> str:
    """``fits``, ``tight`` or ``out of memory``."""
    room = USABLE * gpu.memory
    return "out of memory" if found.low > room else "fits" if found.high <= room else "tight"
