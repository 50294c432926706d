"""Constants of the time formulas from what was measured on a machine, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tp_plugin.estimate.hardware import Gpu
from tp_plugin.estimate.job import PlanError
from tp_plugin.estimate.ledger import Work
from tp_plugin.estimate.timing import Rates, product, soft_maximum

NAMES = tuple(each.name for each in fields(Rates) if each.name not in ("source", "measured"))
"""Constants that a file may have."""

BYTES_OF_UPDATE = 34.0
"""That AdamW moves for each element, as :mod:`~tp_plugin.estimate.layout_time` has it."""


@dataclass
class Timed:
    """What a stretch of a step computes, and the seconds that it took."""

    work: list[Work]
    seconds: float

    @property
    def kernels(self) -> int:
        return sum(work.kernels for work in self.work)

    @property
    def traffic(self) -> float:
        return sum(work.traffic for work in self.work)


@dataclass
class Samples:
    """Seconds measured on one machine.

    Attributes:
        size: bytes of an element of the products.
        products: ``(batch, M, K, N, seconds)``.
        copied: bytes read and written by a copy, and its seconds.
        attention: floating-point operations of a forward and backward of the kernel, and seconds.
        short, long: forward and backward of one layer, of few and of many tokens.
        around: what a step has around its layers, of many tokens.
        optimizer: elements that AdamW stepped, and seconds.
        step: seconds of a step beside all that.
        collectives: ``(bytes that a rank sends in a ring, seconds)``.
    """

    size: float
    products: list[tuple[int, int, int, int, float]]
    copied: tuple[float, float]
    attention: tuple[float, float] | None
    short: Timed
    long: Timed
    around: Timed
    optimizer: tuple[float, float]
    step: float
    collectives: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Calibration:
    """Constants, and what they are relative to.

    Attributes:
        gpu: what was measured; None: that of the plan.
        dtype: in which it was measured; empty: in any.
    """

    rates: Rates
    gpu: Gpu | None = None
    dtype: str = ""
    model: str = ""

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        measured = {name: getattr(self.rates, name) for name in self.rates.measured}
        text = {"model": self.model, "dtype": self.dtype, "gpu": self.gpu and asdict(self.gpu), "rates": measured}
        beside = path.with_name(path.name + ".unfinished")
        beside.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)

    @staticmethod
    def read(path: Path) -> Calibration:
        """The file's.

        Raises:
            PlanError: it is none.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            rates = {name: float(value) for name, value in found["rates"].items()}
            gpu = Gpu(**found["gpu"]) if found.get("gpu") else None
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise PlanError(
                f"--calibration {path}: expected a file that --calibrate wrote, or one with `rates` alone: {error!r}"
            ) from error
        if unknown := sorted(set(rates) - set(NAMES)):
            raise PlanError(f"--calibration {path}: unknown {', '.join(unknown)}; known are {', '.join(NAMES)}")
        constants: Any = {**rates, "measured": tuple(rates), "source": str(path)}
        return Calibration(replace(Rates(), **constants), gpu, str(found.get("dtype", "")), str(found.get("model", "")))


def fit(samples: Samples, base: Gpu, memory: float, name: str) -> tuple[Gpu, Rates]:
    """What the formulas give these seconds with.

    Args:
        base: has what cannot be measured on one machine.
        memory: bytes of the device.
    """
    half_rate = 2.0 if samples.size > 2 else 1.0  # what :func:`product` takes of the peak for 32 bits
    peak = half_rate * max(2.0 * b * m * k * n / t for b, m, k, n, t in samples.products)
    gpu = replace(base, name=name, peak=peak, memory=memory, bandwidth=samples.copied[0] / samples.copied[1])
    found: dict[str, float] = _products(samples, peak / half_rate)
    if samples.attention is not None:
        found["attention"] = samples.attention[0] / (samples.attention[1] * peak)
    if samples.collectives:
        latency, rate = _collectives(samples.collectives)
        gpu, found["link"], found["latency"] = replace(gpu, link=rate), 1.0, latency
    rates = _layers(samples, gpu, replace(Rates(), **found))  # type: ignore[arg-type]
    found |= {"kernel": rates.kernel, "memory": rates.memory, "step": max(samples.step, 0.0)}
    found["head"] = max(samples.around.seconds / _device(samples.around.work, rates, gpu, samples.size), 0.01)
    found["optimizer"] = BYTES_OF_UPDATE * samples.optimizer[0] / (samples.optimizer[1] * gpu.bandwidth)
    constants: Any = {**found, "measured": tuple(found), "source": "measured"}
    return gpu, replace(Rates(), **constants)


def _products(samples: Samples, peak: float) -> dict[str, float]:
    """Seconds · peak / operations are (1 + half / q) / e: a line in 1 / q; large products count more."""
    b, m, k, n, seconds = np.array(samples.products, dtype=float).T
    over = 1 / np.minimum(np.minimum(m, k), n)
    taken, weight = seconds * peak / (2 * b * m * k * n), np.sqrt(seconds)
    (base, slope), *_ = np.linalg.lstsq(np.stack([weight, weight * over], 1), weight * taken, rcond=None)
    if slope < 0 or base <= 0:
        base, slope = float(np.average(taken, weights=seconds)), 0.0
    return {"product": float(1 / base), "half": float(slope / base)}


def _collectives(found: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Latency and bytes a second: the line whose relative errors are least."""
    sent, seconds = np.array(list(found)).T
    lines = np.stack([1 / seconds, sent / seconds], 1)
    (latency, slope), *_ = np.linalg.lstsq(lines, np.ones_like(sent), rcond=None)
    if latency < 0 or slope <= 0:
        latency, slope = float(seconds.min()), float(seconds[sent.argmax()] / sent.max())
    return float(latency), float(1 / slope)


def _products_and_attention(works: list[Work], rates: Rates, gpu: Gpu, size: float) -> float:
    products = (product(b, m, k, n, rates, gpu, size) for work in works for b, m, k, n, _ in work.products)
    return float(sum(products)) + sum(work.attention for work in works) / (gpu.peak * rates.attention)


def _device(works: list[Work], rates: Rates, gpu: Gpu, size: float) -> float:
    traffic = sum(work.traffic for work in works) / (gpu.bandwidth * rates.memory)
    return _products_and_attention(works, rates, gpu, size) + traffic


def _layers(samples: Samples, gpu: Gpu, rates: Rates) -> Rates:
    """The host's time for a kernel from the short layer, the memory's rate from the long one, until both hold."""
    short, long = samples.short, samples.long
    for _ in range(100):
        device = _device(short.work, rates, gpu, samples.size)
        kernel = _other(short.seconds, device) / max(short.kernels, 1)
        host = long.kernels * kernel
        moving = _other(long.seconds, host) - _products_and_attention(long.work, rates, gpu, samples.size)
        least = 0.01 * long.seconds  # where products alone take longer, nothing is left to be explained
        rates = replace(rates, kernel=kernel, memory=long.traffic / (gpu.bandwidth * max(moving, least)))
    return rates


def _other(total: float, one: float) -> float:
    """What together with ``one`` takes ``total`` (:func:`~tp_plugin.estimate.timing.soft_maximum`)."""
    return float(max(total**4 - one**4, 0.0) ** 0.25)


def seconds_of(works: list[Work], rates: Rates, gpu: Gpu, size: float) -> float:
    """Of a stretch of layers, by the constants."""
    host = sum(work.kernels for work in works) * rates.kernel
    return float(soft_maximum(_device(works, rates, gpu, size), host))
