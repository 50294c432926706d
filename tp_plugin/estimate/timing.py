"""Seconds of a step, from what is computed and sent, by formulas whose constants are measured or assumed.

    product         max(2 M K N / (peak · e · q / (q + half)), bytes / memory rate), q = min(M, K, N)
    attention       its operations / (peak · e_attention)
    the rest        bytes read and written / memory rate
    collective      latency + B (n - 1) / n / link, in a ring, twice for a sum; over machines a latency for each hop
    micro-batch     (device⁴ + host⁴)^¼, host = kernels and collectives × what starting one takes
    pipeline        (m - 1) (slowest stage + hop) + one pass through all stages + pp hops      (1F1B)
    step            that + what of the data group's traffic nothing hides + optimizer's bytes / memory rate + a constant

Everything takes numpy arrays as well as numbers: a benchmark scores a thousand runs in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tp_plugin.estimate.hardware import Gpu

Number = Any
"""A float or an array of them."""


@dataclass(frozen=True)
class Rates:
    """What formulas cannot give.

    Attributes:
        product, half: share of the peak that large products reach; the smallest dimension at which half of it is.
        attention: share of the peak that the attention kernel reaches.
        memory: share of the memory's rate that other kernels reach.
        head: what computing around the layers takes (embedding, head, loss), relative to the formulas.
        optimizer: share of the memory's rate that the optimizer reaches.
        kernel, collective: seconds for the host to start one.
        link, network: share of the links' rates that collectives reach.
        latency, hop: seconds of a collective in a machine, and for each rank of a group over machines.
        hidden: share of a backward's compute behind which its collectives over the TP group can hide.
        data_link: the share of ``link`` and ``network`` that the data group reaches.
        data_hidden: share of the last backward behind which the exchange of gradients can hide.
        data_latency: seconds for each doubling of the machines of a data group.
        partitioned: what ZeRO's exchange takes, relative to a ring's volume.
        stage: seconds of a hop between stages beside its bytes.
        step: seconds of a step whatever it does.
        source: where they come from; ``assumed`` are good for ranking only.
        measured: the names of those that are not assumed.
    """

    product: float = 0.60
    half: float = 64.0
    attention: float = 0.45
    memory: float = 0.80
    head: float = 1.0
    optimizer: float = 0.80
    kernel: float = 9e-6
    collective: float = 60e-6
    link: float = 0.64
    network: float = 0.74
    latency: float = 20e-6
    hop: float = 45e-6
    hidden: float = 0.5
    data_link: float = 0.8
    data_hidden: float = 0.5
    data_latency: float = 1e-3
    partitioned: float = 1.0
    stage: float = 1e-3
    step: float = 0.06
    source: str = "assumed"
    measured: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether they were measured on the machine they are used for."""
        return self.source != "assumed"


def product(b: Number, m: Number, k: Number, n: Number, r: Rates, gpu: Gpu, size: float = 2.0) -> Number:
    """``b`` products of M × K by K × N matrices with elements of ``size`` bytes."""
    smallest = np.minimum(np.minimum(m, k), n)
    rate = gpu.peak * r.product * smallest / (smallest + r.half) * np.where(size > 2, 0.5, 1.0)
    moved = size * (m * k + k * n + m * n)
    return b * np.maximum(2.0 * m * k * n / rate, moved / (gpu.bandwidth * r.memory))


def ring(op: str, put: Number, n: Number, r: Rates, gpu: Gpu, per_node: int, share: Number = 1.0) -> Number:
    """A collective into which each of ``n`` neighbouring ranks puts ``put`` bytes.

    Args:
        share: of the rates, for traffic that does not reach them.
    """
    sent = put * {"all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_gather": n - 1.0}[op]
    inside = n <= per_node
    # over machines NCCL has a ring for each network card
    rate = (
        np.where(inside, gpu.link * r.link, np.minimum(gpu.network * per_node * r.network, gpu.link * r.link)) * share
    )
    wait = np.where(inside, r.latency, r.hop * (n - 1))
    return np.where(n > 1, wait + sent / rate, 0.0)


def soft_maximum(device: Number, host: Number) -> Number:
    """The longer of the two, and somewhat more where they are alike: neither is always ahead."""
    return (device**4 + host**4) ** 0.25


def exposed(seconds: Number, behind: Number) -> Number:
    """What of ``seconds`` does not fit behind other work."""
    return np.maximum(seconds - behind, 0.0)


def data_seconds(
    put: Number, dp: Number, tp: Number, engine_factor: Number, r: Rates, gpu: Gpu, per_node: int
) -> Number:
    """The exchange of gradients of ``put`` bytes (and of weights, for engines that split them) over the data group."""
    inside = dp * tp <= per_node
    peers = np.minimum(dp, np.maximum(1.0, per_node / tp))  # of the group in a machine: each has a network card
    far = np.minimum(gpu.network * peers * r.network, gpu.link * r.link)
    rate = np.where(inside, gpu.link * r.link, far) * r.data_link
    machines = np.maximum(1.0, dp * tp / per_node)
    return np.where(dp > 1, engine_factor * put * (dp - 1) / dp / rate + r.data_latency * np.log2(machines), 0.0)


def step(
    slowest: Number, through: Number, micro_batches: Number, pp: Number, hop: Number, others: Number, r: Rates
) -> Number:
    """A step of ``micro_batches``: the slowest stage sets the pace, one passes through all.

    Args:
        others: the exposed exchange over the data group, and the optimizer.
    """
    return (micro_batches - 1) * (slowest + hop) + through + np.where(pp > 1, pp * hop, 0.0) + others + r.step
