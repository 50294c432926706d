"""All layouts of a job on a cluster, each with its memory, its time and a verdict; best first."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import PolicyError
from tp_plugin.estimate import memory as memories
from tp_plugin.estimate.job import Candidate, Cluster, Job, Layout, Memory, PlanError
from tp_plugin.estimate.layout_time import LayoutTime, Seconds
from tp_plugin.estimate.states import Held, held_parameters
from tp_plugin.estimate.timing import Rates
from tp_plugin.estimate.trace import Trace, cut, find_layers, trace
from tp_plugin.policy import Policy, make_plan
from tp_plugin.policy.stacks import stacks

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
ORDER = {"fits": 0, "tight": 1, "out of memory": 2}
WITH_STAGES = ("ddp",)
"""Engines that go with pipeline stages."""


class Planner:
    """Answers for one model; what is traced is traced once.

    Args:
        model: whole, on the meta device, in the job's dtype, adapters included.
        policy: how it is sharded.
        example: arguments of a forward on one sample beside the tokens (pictures, sounds), on the meta device.
        options: the plugin's settings; sizes and sequence parallelism are each layout's own.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        job: Job,
        cluster: Cluster,
        rates: Rates,
        example: Mapping[str, Any] | None = None,
        options: RunConfig | None = None,
    ):
        self.model, self.policy, self.job, self.cluster, self.rates = model, policy, job, cluster, rates
        self.example, self.options = example, options or RunConfig()
        self._known: Seconds = {}
        self.stacks = find_layers(model, make_plan(model, policy, 1))
        self._cut = cut(model, self.stacks)
        self.gpu = cluster.hardware

    @property
    def layers(self) -> int:
        """Of the deepest stack."""
        return max(len(one.kinds) for one in self.stacks)

    @functools.cached_property
    def legal(self) -> list[int]:
        """TP sizes that the policy can do with this model."""
        found = []
        for size in SIZES:
            try:
                make_plan(self.model, self.policy, size)
            except PolicyError:
                continue
            found.append(size)
        return found

    @functools.cached_property
    def splits_sequence(self) -> bool:
        """Whether sequence parallelism works with this model."""
        size = next((size for size in self.legal if size > 1), 0)
        if not size:
            return False
        try:
            return bool(stacks(self.model, make_plan(self.model, self.policy, size)))
        except PolicyError:
            return False

    def candidates(self) -> list[Candidate]:
        """Every layout, best first.

        Raises:
            PlanError: nothing can be made of what is fixed, with what could.
        """
        found = [self.candidate(layout) for layout in self._layouts()]
        return sorted(
            found, key=lambda c: (ORDER[c.verdict], c.seconds if c.verdict != "out of memory" else c.memory.low)
        )

    def candidate(self, layout: Layout) -> Candidate:
        """What a layout would be like."""
        held = self.memory(layout)
        seconds = self.time(layout)
        total = sum(seconds.values())
        tokens = self.job.global_batch * self.job.sequence / total / self.cluster.gpus
        verdict = memories.verdict(held, self.gpu)
        return Candidate(layout, held, verdict, total, seconds, tokens, self._warnings(layout, seconds))

    def memory(self, layout: Layout) -> Memory:
        """Of the fullest stage."""
        step = self.trace(layout.tp, layout.sequence_parallel, layout.checkpointing)
        mixed, job = layout.engine == "fsdp2" and self.job.dtype != "fp32", self.job
        return memories.memory(
            step, self.held(layout.tp), layout, job.optimizer, mixed=mixed, layers=self.layers, gpu=self.gpu
        )

    def memory_of_stage(self, layout: Layout, stage: int) -> Memory:
        """What is alive there, without what an allocator holds beside."""
        step = self.trace(layout.tp, layout.sequence_parallel, layout.checkpointing)
        layers = memories.layers_of_stage(self.layers, layout.pp, stage)
        held = self.held(layout.tp)
        return memories.of_stage(step, held, layout, self.job.optimizer, False, layers, stage, None)

    def time(self, layout: Layout) -> dict[str, float]:
        """Seconds of a step by part."""
        step = self.trace(layout.tp, layout.sequence_parallel, False)
        work = LayoutTime(
            step, self.held(layout.tp), layout, self.rates, self.cluster, self.layers, self.job, self._known
        )
        return work.parts()

    @functools.cache  # noqa: B019 - a planner lives as long as a command
    def held(self, tp: int) -> list[Held]:
        """What a rank holds of the parameters."""
        plan = make_plan(self.model, self.policy, tp)
        return held_parameters(self.model, plan, [one.path for one in self.stacks], bool(self.job.quantized))

    @functools.cache  # noqa: B019
    def trace(self, tp: int, sequence_parallel: bool, checkpointing: bool) -> Trace:
        """A step of one sequence."""
        if checkpointing and not self.job.lora_rank:
            return memories.checkpointed(self.trace(tp, sequence_parallel, False))
        options = replace(self.options, tp_size=tp, sequence_parallel=sequence_parallel)
        return trace(self._cut, self.policy, self.stacks, self._batch(), tp, options, checkpointing)

    def _batch(self) -> dict[str, Any]:
        if self.example:
            return dict(self.example)
        ids = torch.zeros(1, self.job.sequence, dtype=torch.long, device="meta")
        return {"input_ids": ids, "labels": ids}

    def _layouts(self) -> Iterator[Layout]:
        job, gpus = self.job, self.cluster.gpus
        made = False
        for tp in self._tp_sizes():
            for pp in self._pp_sizes(tp):
                dp = gpus // (tp * pp)
                for batch in self._micro_batches(dp, pp):
                    accumulation = job.global_batch // (dp * batch)
                    for engine in self._engines(dp, pp):
                        for checkpointing in (False, True) if job.checkpointing is None else (job.checkpointing,):
                            for split in self._sequence_parallel(tp):
                                made = True
                                yield Layout(tp, pp, dp, batch, accumulation, engine, checkpointing, split)
        if not made:
            fixed = f"--global-batch {job.global_batch}"
            fixed += f" --micro-batch {job.micro_batch}" if job.micro_batch else ""
            least = min(gpus // (tp * pp) for tp in self._tp_sizes() for pp in self._pp_sizes(tp))
            raise PlanError(
                f"{fixed} is no multiple of micro-batch × replicas for any layout of {gpus} GPUs; write for example "
                f"--global-batch {max(1, round(job.global_batch / least)) * least * (job.micro_batch or 1)}"
            )

    def _tp_sizes(self) -> list[int]:
        gpus, asked = self.cluster.gpus, self.job.tp
        if asked is not None:
            if asked not in self.legal:
                legal = ", ".join(map(str, self.legal))
                try:
                    make_plan(self.model, self.policy, asked)
                except PolicyError as error:
                    raise PlanError(f"--tp {asked}: {error}; legal sizes are {legal}") from error
            if gpus % asked:
                raise PlanError(f"--tp {asked} does not divide --gpus {gpus}")
            return [asked]
        return [size for size in self.legal if gpus % size == 0 and size <= self.cluster.gpus_per_node]

    def _pp_sizes(self, tp: int) -> list[int]:
        room, asked = self.cluster.gpus // tp, self.job.pp
        if asked is not None and (room % asked or asked > self.layers):
            raise PlanError(f"--pp {asked}: expected a number that divides {room} (GPUs / tp), at most {self.layers}")
        if asked is not None:
            return [asked]
        sizes = (1, 2, 4, 8, 16) if len(self.stacks) == 1 else (1,)
        return [size for size in sizes if room % size == 0 and size <= self.layers]

    def _micro_batches(self, dp: int, pp: int) -> list[int]:
        asked, each, rest = self.job.micro_batch, self.job.global_batch // dp, self.job.global_batch % dp
        if rest:
            return []
        sizes = [asked] if asked else [1, 2, 4, 8, 16, 32]
        return [size for size in sizes if each % size == 0 and (pp == 1 or each // size >= pp)]

    def _engines(self, dp: int, pp: int) -> tuple[str, ...]:
        asked = self.job.engine
        if asked is not None:
            return (asked,) if pp == 1 or asked in WITH_STAGES else ()
        if dp == 1:
            return ("ddp",)
        return WITH_STAGES if pp > 1 else ("ddp", "zero1", "zero2", "zero3", "fsdp2")

    def _sequence_parallel(self, tp: int) -> tuple[bool, ...]:
        asked = self.job.sequence_parallel
        if tp == 1 or not self.splits_sequence:
            return (False,)
        return (False, True) if asked is None else (asked,)

    def _warnings(self, layout: Layout, seconds: dict[str, float]) -> list[str]:
        found = []
        if layout.tp > self.cluster.gpus_per_node:
            found.append(f"tp {layout.tp} goes over machines: its collectives take the network")
        config = getattr(self.model.config, "get_text_config", lambda: self.model.config)()
        heads, kv = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // heads if heads and hasattr(config, "hidden_size") else 0
        )
        if kv and kv < layout.tp:
            found.append(f"{kv} key/value heads on {layout.tp} ranks: some hold the same")
        if width and width % 64:
            found.append(f"heads of {width}: no multiple of 64, attention kernels lose about a third")
        if seconds["launch"] > seconds["compute"]:
            found.append("launch-bound: the host starts kernels slower than the device runs them")
        return found
