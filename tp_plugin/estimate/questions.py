"""What people ask once they see a plan: what fits beside it, what a switch costs, how few GPUs would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tp_plugin.estimate import memory as memories
from tp_plugin.estimate.hardware import GIB
from tp_plugin.estimate.job import Candidate, Layout
from tp_plugin.estimate.search import Planner

WORDS = {"ddp": "DDP", "zero1": "ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3", "fsdp2": "FSDP2"}


@dataclass
class Switch:
    """What a change of one thing does: bytes on the fullest rank, and a share of the step's time."""

    name: str
    bytes: float
    time: float


class Questions:
    """About the candidates of a planner, best first."""

    def __init__(self, planner: Planner, candidates: list[Candidate]):
        self.planner, self.candidates = planner, candidates
        self.parameters = sum(p.numel() for p in planner.model.parameters())

    def largest_micro_batch(self, best: Candidate) -> int:
        """That still fits, whether or not it divides the batch; 0 if none does."""
        return self._largest(lambda n: replace(best.layout, micro_batch=n))

    def largest_sequence(self, best: Candidate) -> int:
        """Tokens of one sequence that still fit at micro-batch 1, to a thousand.

        Activations grow with the tokens (and attention that is not fused with their square, which is not counted).
        """
        sequences = self._largest(lambda n: replace(best.layout, micro_batch=n))
        if not sequences:
            return 0
        one, two = (self.planner.memory(replace(best.layout, micro_batch=n)).high for n in (1, 2))
        room = memories.USABLE * self.planner.gpu.memory - one
        found = self.planner.job.sequence * (1 + room / max(two - one, 1.0))
        return int(found // 1024 * 1024) or self.planner.job.sequence

    def _largest(self, layout_of: Any) -> int:
        def fits(n: int) -> bool:
            return memories.verdict(self.planner.memory(layout_of(n)), self.planner.gpu) == "fits"

        if not fits(1):
            return 0
        low = 1
        while low < 4096 and fits(2 * low):
            low *= 2
        high = 2 * low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def least_gpus(self) -> int | None:
        """GPUs that hold the job somehow: any engine, with checkpointing, a micro-batch of 1; None beyond 4096."""
        planner = self.planner
        sizes = [size for size in planner.legal if size <= max(planner.cluster.gpus_per_node, 8)]
        for gpus in (1 << n for n in range(13)):
            for tp in (size for size in sizes if gpus % size == 0):
                for engine in ("ddp", "zero3", "fsdp2"):
                    layout = Layout(tp, 1, gpus // tp, 1, 2, engine, True, tp > 1 and planner.splits_sequence)
                    if memories.verdict(planner.memory(layout), planner.gpu) == "fits":
                        return gpus
        return None

    def least_gpus_line(self) -> str:
        """In words."""
        least = self.least_gpus()
        name = self.planner.gpu.name
        return f"{least} × {name} would hold it, with checkpointing." if least else f"No 4096 × {name} hold it."

    def switches(self, best: Candidate) -> Iterator[Switch]:
        """Checkpointing, sequence parallelism, other engines, half the micro-batch and twice the tp, each by itself."""
        layout = best.layout
        changed: list[tuple[str, Layout]] = []
        without = "without" if layout.checkpointing else "with"
        changed.append((f"{without} checkpointing", replace(layout, checkpointing=not layout.checkpointing)))
        if layout.tp > 1 and self.planner.splits_sequence:
            without = "without" if layout.sequence_parallel else "with"
            other = replace(layout, sequence_parallel=not layout.sequence_parallel)
            changed.append((f"{without} sequence parallelism", other))
        if layout.dp > 1:
            engines = ("ddp", "zero1", "zero2", "zero3", "fsdp2") if layout.pp == 1 else ("ddp", "zero1")
            changed += [(WORDS[e], replace(layout, engine=e)) for e in engines if e != layout.engine]
        if layout.micro_batch > 1:
            half = replace(layout, micro_batch=layout.micro_batch // 2, accumulation=2 * layout.accumulation)
            changed.append((f"micro-batch {half.micro_batch}", half))
        if 2 * layout.tp in self.planner.legal and layout.dp % 2 == 0:
            changed.append((f"tp {2 * layout.tp}", replace(layout, tp=2 * layout.tp, dp=layout.dp // 2)))
        for name, other in changed:
            found = self.planner.candidate(other)
            grown = found.memory.low - best.memory.low
            yield Switch(name, grown, found.seconds / best.seconds - 1)

    def notes(self, shown: list[Candidate]) -> list[str]:
        """What to know: whether tensor parallelism pays at all, and warnings."""
        found = []
        best = shown[0]
        if best.layout.tp == 1 and best.verdict == "fits" and self.planner.cluster.gpus > 1:
            engine = WORDS[best.layout.engine]
            found.append(f"tp = 1 with {engine} is faster here: the model fits without tensor parallelism.")
        if self.planner.job.quantized:
            found.append("Quantized models are sharded over DDP without stages; other layouts are planned only.")
        for each in shown:
            found += [f"{each.layout.short}: {warning}." for warning in each.warnings]
        return list(dict.fromkeys(found))

    def inference(self) -> list[dict[str, float]]:
        """``generate`` by tp: bytes of weights, and of the cache of keys and values of one sequence."""
        config: Any = self.planner.model.config
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0) or 0
        kv = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        size = 4 if self.planner.job.dtype == "fp32" else 2
        rows = []
        for tp in (size_ for size_ in self.planner.legal if size_ <= 8):
            each = max(-(-kv // tp), 1) * 2 * width
            if getattr(text, "kv_lora_rank", None):  # transformers keeps latent attention's keys and values by head
                each = -(-heads // tp) * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
            cache = float(size * each * self.planner.layers * self.planner.job.sequence)
            rows.append({"tp": tp, "weights": sum(p.numel * p.size for p in self.planner.held(tp)), "cache": cache})
        return rows

    def inference_line(self) -> str:
        """In words."""
        parts = [f"tp {r['tp']:.0f}: {r['weights'] / GIB:.1f} + {r['cache'] / GIB:.2f}" for r in self.inference()]
        return f"generate(), GiB of weights + cache of a sequence of {self.planner.job.sequence:,}: {'; '.join(parts)}."

    def hours_line(self, best: Candidate) -> str:
        """Hours of the whole training."""
        job, gpus = self.planner.job, self.planner.cluster.gpus
        hours = job.tokens / (best.tokens_per_gpu * gpus) / 3600
        doubt = "" if self.planner.rates.is_measured else " by the hardware table (roughly: it may be off by 40%)"
        return f"{job.tokens:.3g} tokens take {hours:,.1f} hours, {hours * gpus:,.0f} GPU hours{doubt}."
