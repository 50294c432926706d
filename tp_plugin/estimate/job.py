"""What is asked and what is answered: a job, a cluster, a layout of the job on the cluster, a candidate. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tp_plugin.errors import TPError
from tp_plugin.estimate.hardware import Gpu, gpu

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
DTYPES = ("bf16", "fp16", "fp32")


class PlanError(TPError):
    """Something asked that cannot be planned."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal machines.

    Args:
        gpus: all of them.
        gpus_per_node: of one machine; default 8, or all if there are fewer.
        gpu: what they are: a name in :data:`~tp_plugin.estimate.hardware.GPUS`, or the figures.
    """

    gpus: int
    gpus_per_node: int = 0
    gpu: Gpu | str = "h100"

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise PlanError(f"--gpus {self.gpus}: expected at least 1")
        per_node = self.gpus_per_node or min(8, self.gpus)
        if per_node < 1 or (self.gpus > per_node and self.gpus % per_node):
            raise PlanError(f"--gpus {self.gpus} are no whole number of machines with --gpus-per-node {per_node}")
        object.__setattr__(self, "gpus_per_node", min(per_node, self.gpus))
        object.__setattr__(self, "gpu", self.hardware)

    @property
    def hardware(self) -> Gpu:
        """What one GPU is like."""
        return gpu(self.gpu) if isinstance(self.gpu, str) else self.gpu


@dataclass(frozen=True)
class Job:
    """What is to be trained, and what of the layout is fixed; None leaves it to the search.

    Attributes:
        sequence, global_batch: tokens of a sequence; sequences of an optimizer step.
        lora_rank: 0 trains all weights.
        lora_targets: names of adapted linears, or ``all-linear``.
        quantized: ``nf4`` for frozen weights in 4 bits, or empty.
        tokens: of the whole training.
    """

    sequence: int = 2048
    global_batch: int = 64
    micro_batch: int | None = None
    lora_rank: int = 0
    lora_targets: str | tuple[str, ...] = "all-linear"
    quantized: str = ""
    optimizer: str = "adamw"
    engine: str | None = None
    checkpointing: bool | None = None
    dtype: str = "bf16"
    attention: str = "sdpa"
    compiled: bool = False
    tp: int | None = None
    pp: int | None = None
    sequence_parallel: bool | None = None
    tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sequence", "global_batch", "micro_batch", "tp", "pp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name, known in (("engine", ENGINES), ("optimizer", OPTIMIZERS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise PlanError(f"--{name} {value}: expected one of {', '.join(known)}")
        if self.quantized not in ("", "nf4"):
            raise PlanError(f"--quantized {self.quantized}: expected nf4")
        if self.quantized and not self.lora_rank:
            raise PlanError("--quantized nf4: weights in 4 bits are not trained; add --lora r=16,all-linear")
        if self.attention not in ("sdpa", "eager"):
            raise PlanError(f"--attention {self.attention}: expected sdpa or eager")


@dataclass(frozen=True)
class Layout:
    """How a job lies on a cluster.

    Attributes:
        accumulation: micro-batches of an optimizer step.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    engine: str = "ddp"
    checkpointing: bool = False
    sequence_parallel: bool = False

    @property
    def short(self) -> str:
        """``tp 4 × pp 1 × dp 2, zero1, micro-batch 2 × 16, checkpointing``."""
        words = [f"tp {self.tp} × pp {self.pp} × dp {self.dp}", self.engine]
        words.append(f"micro-batch {self.micro_batch} × {self.accumulation}")
        words += ["checkpointing"] * self.checkpointing + ["sequence parallel"] * self.sequence_parallel
        return ", ".join(words)


@dataclass
class Memory:
    """Bytes on a rank of the fullest stage.

    Attributes:
        parts: what they are for.
        low, high: between what the peak is expected: without, and with all that an allocator may hold beside.
        stage: which stage it is.
    """

    parts: dict[str, float]
    low: float
    high: float
    stage: int = 0

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass
class Candidate:
    """A layout, and what it would be like.

    Attributes:
        verdict: ``fits``, ``tight`` or ``out of memory``.
        seconds: of an optimizer step; with the hardware table's constants it is good for ranking only.
        time: the seconds by part.
        tokens_per_gpu: tokens a second and GPU.
        warnings: what to know before taking it.
    """

    layout: Layout
    memory: Memory
    verdict: str
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)
    tokens_per_gpu: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        from dataclasses import asdict

        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}
