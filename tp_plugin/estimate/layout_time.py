"""A step's seconds by part, for one layout of a traced model."""

from __future__ import annotations

from tp_plugin.estimate.job import Cluster, Job, Layout
from tp_plugin.estimate.memory import in_stage, layers_of_stage, part_of_stage
from tp_plugin.estimate.states import Held
from tp_plugin.estimate.timing import Rates, data_seconds, exposed, product, ring, soft_maximum, step
from tp_plugin.estimate.trace import Segment, Trace

HEAD_KERNELS = 40
"""Of the head and the loss on a device; on the CPU they work block by block, in many more."""
COMPILED_KERNELS, COMPILED_TRAFFIC = 0.35, 0.5
"""What torch.compile leaves of the kernels and of the traffic of element-wise operations."""


Seconds = dict[tuple[int, int], tuple[float, float, float]]
"""``(id of a segment, sequences)`` → seconds of compute, of collectives, of the host."""


class LayoutTime:
    """One layout's.

    Args:
        trace: of one sequence, without checkpointing.
        layers: of the whole model.
        known: what was computed for other layouts of the same traces.
    """

    def __init__(
        self,
        trace: Trace,
        held: list[Held],
        layout: Layout,
        rates: Rates,
        cluster: Cluster,
        layers: int,
        job: Job,
        known: Seconds,
    ):
        self.trace, self.held, self.layout, self.rates = trace, held, layout, rates
        self.cluster, self.job, self.layers, self.gpu = cluster, job, layers, cluster.hardware
        self._seconds = known

    def _segment(self, segment: Segment, is_layer: bool) -> tuple[float, float, float]:
        """Seconds of compute, of collectives, and of the host."""
        key = id(segment), self.layout.micro_batch
        if key in self._seconds:
            return self._seconds[key]
        batch, rates, gpu, work = self.layout.micro_batch, self.rates, self.gpu, segment.work
        size = 4.0 if self.job.dtype == "fp32" else 2.0
        compute = work.attention * batch / (gpu.peak * rates.attention)
        for b, m, k, n, grows in work.products:
            scale = {"b": (batch, 1, 1), "m": (1, batch, 1), "k": (1, 1, batch)}.get(grows, (1, 1, 1))
            compute += float(product(b * scale[0], m * scale[1], k * scale[2], n, rates, gpu, size))
        traffic = work.traffic * (COMPILED_TRAFFIC if self.job.compiled and is_layer else 1.0)
        compute += traffic * batch / (gpu.bandwidth * rates.memory)
        compute *= 1.0 if is_layer else rates.head
        sent: float = sum(
            n * float(ring(op, put * batch, self.layout.tp, rates, gpu, self.cluster.gpus_per_node))
            for (op, put), n in segment.sent.items()
        )
        kernels: float = work.kernels if is_layer else min(work.kernels, HEAD_KERNELS)
        kernels *= COMPILED_KERNELS if self.job.compiled and is_layer else 1.0
        host = kernels * rates.kernel + sum(segment.sent.values()) * rates.collective
        self._seconds[key] = compute, sent, host
        return self._seconds[key]

    def _stage(self, stage: int) -> dict[str, float]:
        layout, pp = self.layout, self.layout.pp
        layers, first, last = layers_of_stage(self.layers, pp, stage), stage == 0, stage == pp - 1
        compute = sent = host = 0.0
        for found, back in ((self.trace.forward, False), (self.trace.backward, True)):
            for key, segment in part_of_stage(found, layers, first, last):
                one, comm, start = self._segment(segment, bool(key[0]))
                again = 2 if layout.checkpointing and key[0] and not back else 1  # layers run again
                compute += one * again
                host += start * again
                sent += comm * again if not back else float(exposed(comm, self.rates.hidden * one))
        return {"compute": compute, "tp": sent, "host": host, "all": float(soft_maximum(compute + sent, host))}

    def parts(self) -> dict[str, float]:
        """Compute, launch, TP, bubble, data traffic, optimizer, rest; they add up to the step."""
        layout, rates, gpu = self.layout, self.rates, self.gpu
        stages = [self._stage(stage) for stage in range(layout.pp)]
        slowest = max(stages, key=lambda each: each["all"])
        through, m = sum(each["all"] for each in stages), layout.accumulation
        hidden = max((s.output for key, s in self.trace.forward if key[0]), default=0) * layout.micro_batch
        hop = 0.0
        if layout.pp > 1:
            far = layout.tp * layout.dp >= self.cluster.gpus_per_node
            rate = gpu.network * rates.network if far else gpu.link * rates.link
            hop = rates.stage + 2 * hidden / (layout.tp if layout.sequence_parallel else 1) / rate
        data = self._data(slowest["all"])
        update = self._update()
        total = float(step(slowest["all"], through, m, layout.pp, hop, data + update, rates))
        busy = m * slowest["all"]
        launch = m * (slowest["all"] - slowest["compute"] - slowest["tp"])
        return {
            "compute": m * slowest["compute"],
            "launch": launch,
            "tp": m * slowest["tp"],
            "bubble": total - busy - data - update - rates.step,
            "data": data,
            "optimizer": update,
            "rest": rates.step,
        }

    def _mine(self) -> list[Held]:
        first = layers_of_stage(self.layers, self.layout.pp, 0)
        return [p for p in self.held if any(in_stage(place, first, True, self.layout.pp == 1) for place in p.places)]

    def _data(self, micro_batch: float) -> float:
        """What of the exchange over the data group nothing hides."""
        layout, rates, gpu = self.layout, self.rates, self.gpu
        if layout.dp == 1:
            return 0.0
        held = self._mine()
        trained = sum(p.numel * p.size for p in held if p.trained)
        whole = sum(p.numel * p.size for p in held)
        near = self.cluster.gpus_per_node

        def seconds(put: float, factor: float) -> float:
            return float(data_seconds(put, layout.dp, layout.tp, factor, rates, gpu, near))

        behind = rates.data_hidden * micro_batch * 2 / 3
        if layout.engine in ("zero3", "fsdp2"):  # weights come twice in each micro-batch, gradients go once
            each = seconds(2 * whole + trained, 1.0)
            return layout.accumulation * float(exposed(each, micro_batch * rates.data_hidden * 2))
        if layout.engine == "zero2":
            each = seconds(trained, 2.0)
            return layout.accumulation * float(exposed(each, behind)) + seconds(trained, 1.0)
        exchange = float(exposed(seconds(trained, 2.0), behind))
        return exchange + (seconds(trained, 1.0) * rates.partitioned if layout.engine == "zero1" else 0.0)

    def _update(self) -> float:
        held = self._mine()
        split = self.layout.dp if self.layout.engine != "ddp" else 1
        trained = sum(p.numel for p in held if p.trained)
        moved = trained * 34.0 / split
        return moved / (self.gpu.bandwidth * self.rates.optimizer)
