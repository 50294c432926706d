"""``tp-plugin plan --calibrate``: times what a step of the model is made of on this machine, about a minute."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tp_plugin.cli.local_ranks import run_on_ranks
from tp_plugin.cli.plan import TORCH
from tp_plugin.errors import TPError
from tp_plugin.estimate.calibration import Calibration, Samples, Timed, fit
from tp_plugin.estimate.hardware import GIB
from tp_plugin.estimate.ledger import Work
from tp_plugin.estimate.search import Planner
from tp_plugin.estimate.timing import Rates

PRODUCTS = 16
"""Shapes of products that are timed, those in which most is computed."""
SHORT = 16
"""Tokens of the short layer: the host starts its kernels slower than a device runs them."""
REPEATS, LONG_ENOUGH = 20, 0.3
"""Calls of one thing at most, and seconds after which there are enough."""
SIZES = tuple(4**power for power in range(5, 13))
"""Bytes of the collectives."""

Stopwatch = Callable[[str, Callable[[], Any]], float]
"""``(what it is, a call)`` → seconds that the call takes."""


def stopwatch(what: str, call: Callable[[], Any]) -> float:
    """The fastest of some calls behind one that is not counted: what else the machine does is not the model's."""
    found: list[float] = []
    began = None
    while began is None or (len(found) < REPEATS and time.perf_counter() - began < LONG_ENOUGH):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if began is None:
            began = time.perf_counter()
            if began - start > 2 * LONG_ENOUGH:  # one is enough
                return began - start
            continue
        found.append(time.perf_counter() - start)
    return min(found)


def calibrate(planner: Planner, file: Path, watch: Stopwatch = stopwatch) -> Calibration:
    """Measure and write ``file``.

    Raises:
        TPError: the model's layers do not fit here, it needs more than tokens, or the file cannot be written.
    """
    if planner.example:
        raise TPError("--calibrate: only models of tokens are timed; take a calibration of another model")
    if not file.absolute().parent.is_dir():
        raise TPError(f"--calibrate {file}: there is no such folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = _memory(device)
    samples = measure(planner, device, memory, watch)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    gpu, rates = fit(samples, planner.gpu, memory, name)
    gpu = replace(gpu, source=f"measured; network: {planner.gpu.name}, assumed")
    model_type: Any = planner.model.config.model_type  # type: ignore[union-attr]
    found = Calibration(rates, gpu, planner.job.dtype, model_type)
    found.write(file)
    return found


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measure(planner: Planner, device: torch.device, memory: float, watch: Stopwatch) -> Samples:
    """Everything, each by itself."""
    job = planner.job
    dtype = TORCH[job.dtype]
    needed = 8 * sum(p.numel() * p.element_size() for p in planner._cut.parameters())
    if needed > 0.8 * memory:
        raise TPError(f"--calibrate: a step of the layers needs {needed / GIB:.0f} GiB, {memory / GIB:.0f} are here")
    products = [
        (*shape, watch(f"product {shape}", _product(shape, dtype, device))) for shape in _shapes(planner)
    ]  # fmt: skip
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.nbytes, watch("copy", lambda: target.copy_(source))
    long = OneStep(planner, job.sequence, device)
    short = OneStep(planner, min(SHORT, job.sequence), device)
    at_long, at_short = long.timed_layer(watch, "long"), short.timed_layer(watch, "short")
    model = watch("model", long.forward_and_backward)
    optimizer = torch.optim.AdamW(long.model.parameters(), lr=1e-6)
    stepped = watch("optimizer", optimizer.step)
    whole = watch("step", lambda: (long.forward_and_backward(), optimizer.step(), optimizer.zero_grad()))
    layers = long.layers_like_it() * at_long.seconds
    return Samples(
        dtype.itemsize, products, copied, _attention(planner, dtype, device, watch),
        at_short, at_long, Timed(long.around(), max(model - layers, 0.01 * model)),
        (float(sum(p.numel() for p in long.model.parameters())), stepped), whole - model - stepped,
        _collectives(planner, device),
    )  # fmt: skip


def _shapes(planner: Planner) -> list[tuple[int, int, int, int]]:
    """Products of the model at every tp that exists on this machine, those of most operations first."""
    operations: Counter[tuple[int, int, int, int]] = Counter()
    for tp in (1, *_local_sizes(planner)):
        step = planner.trace(tp, False, False)
        for _, segment in (*step.forward, *step.backward):
            for *shape, _ in segment.work.products:
                b, m, k, n = shape
                operations[b, m, k, n] += 2 * b * m * k * n
    return [shape for shape, _ in operations.most_common(PRODUCTS)]


def _local_sizes(planner: Planner) -> list[int]:
    """TP sizes above 1 of which this machine has the ranks."""
    import os

    ranks = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    return [size for size in planner.legal if 1 < size <= min(ranks, planner.cluster.gpus_per_node)]


def _product(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    b, m, k, n = shape
    left, right = torch.randn(b, m, k, device=device).to(dtype), torch.randn(b, k, n, device=device).to(dtype)
    return (lambda: left[0] @ right[0]) if b == 1 else (lambda: left @ right)


def _attention(
    planner: Planner, dtype: torch.dtype, device: torch.device, watch: Stopwatch
) -> tuple[float, float] | None:
    """The fused kernel's forward and backward, causal, in the model's heads; None if it has no such heads."""
    config: Any = planner.model.config
    text, tokens = config.get_text_config(), planner.job.sequence
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    if not width or planner.job.attention != "sdpa":
        return None
    q, k, v = (torch.randn(1, heads, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return 3.5 * 2.0 * heads * tokens * tokens * width, watch("attention", call)


class OneStep:
    """The model with only the layers that are traced, on the device, and what is known of it at some sequence."""

    def __init__(self, planner: Planner, sequence: int, device: torch.device):
        self.planner = Planner(
            planner.model, planner.policy, replace(planner.job, sequence=sequence), planner.cluster, Rates()
        )
        self.trace = self.planner.trace(1, False, False)
        self.model: Any = copy.deepcopy(self.planner._cut).to_empty(device=device).train()
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if not isinstance(tensor, nn.Parameter):
                    tensor.zero_()
                elif tensor.dim() < 2:
                    tensor.fill_(1.0)
                else:
                    tensor.normal_(0, 0.02)
        config: Any = planner.model.config
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(3, vocabulary, (1, sequence), device=device)
        self.batch = {"input_ids": ids, "labels": ids}
        self.stack = max(self.planner.stacks, key=lambda stack: len(stack.kinds))
        common = Counter(self.stack.kinds).most_common(1)[0][0]
        self.kind, self.at = common, [at for at in self.stack.chosen if self.stack.kinds[at] == common][-1]

    def forward_and_backward(self) -> None:
        """A micro-batch."""
        self.model(**self.batch).loss.backward()

    def timed_layer(self, watch: Stopwatch, name: str) -> Timed:
        """One layer's forward and backward, with what the model calls it with."""
        stack: Any = self.model.get_submodule(self.stack.path)
        layer, given = stack[self.stack.chosen.index(self.at)], []

        def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            given.append((args, kwargs))

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        self.forward_and_backward()
        handle.remove()
        args, kwargs = given[0]
        args = tuple(_detached(value) for value in args)
        kwargs = {key: _detached(value) for key, value in kwargs.items()}

        def call() -> None:
            out = layer(*args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            out.backward(torch.ones_like(out))

        return Timed(self._work((self.stack.path, self.at)), watch(f"layer {name}", call))

    def _work(self, key: tuple[str, int]) -> list[Work]:
        return [segment.work for place, segment in (*self.trace.forward, *self.trace.backward) if place == key]

    def around(self) -> list[Work]:
        """What the model computes in front of its layers and behind them."""
        return [segment.work for place, segment in (*self.trace.forward, *self.trace.backward) if not place[0]]

    def layers_like_it(self) -> float:
        """How many times the timed layer all layers are, by their operations."""

        def operations(key: tuple[str, int]) -> float:
            return sum(work.flops for work in self._work(key))

        keys = [(stack.path, at) for stack in self.planner.stacks for at in stack.chosen]
        return sum(map(operations, keys)) / operations((self.stack.path, self.at))


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _collectives(planner: Planner, device: torch.device) -> list[tuple[float, float]]:
    """``(bytes sent in a ring, seconds)`` at every tp that this machine has ranks for."""
    found: list[tuple[float, float]] = []
    for ranks in _local_sizes(planner):
        slowest = zip(*run_on_ranks(ranks, timed_collectives, device.type), strict=True)
        found += [(rows[0][0], max(seconds for _, seconds in rows)) for rows in slowest]
    return found


def timed_collectives(kind: str) -> list[tuple[float, float]]:
    """On every rank: sums and gathers of all sizes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl") if kind == "cuda" else None
    found = []
    for size in SIZES:
        put = torch.zeros(size // 4, device=kind)
        gathered = [torch.empty_like(put) for _ in range(world)]
        calls: list[tuple[float, Callable[[], Any]]] = [
            (2 * (world - 1) / world, lambda put=put: dist.all_reduce(put, group=group)),  # type: ignore[misc]
            (world - 1, lambda put=put, to=gathered: dist.all_gather(to, put, group=group)),  # type: ignore[misc]
        ]
        for factor, call in calls:
            call()
            seconds = []
            for _ in range(5):  # as many on every rank
                start = time.perf_counter()
                call()
                if kind == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            found.append((factor * size, min(seconds)))
    return found
