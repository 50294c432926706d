"""Whether an optimizer updates each element by that element's gradients alone: then shards train as the whole does.

Torch's and the usual fused ones are known. Any other is tried, on a small matrix and a vector: whole, and in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

KNOWN: dict[str, tuple[str, ...]] = {
    "torch": (
        *("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"),
        "SparseAdam",
    ),
    "apex": ("FusedAdam", "FusedSGD", "FusedAdagrad"),
    "deepspeed": ("FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "FusedLion", "DeepSpeedCPULion"),
    "bitsandbytes": ("Optimizer8bit",),  # of which block_states.py refuses what looks at whole tensors
}
"""Package → classes whose update rule is elementwise."""

SCALES = (1.0, 30.0, 0.03, 10.0)
"""Of the gradients of a trial's steps: rules that look at the size of a whole gradient show it."""

Cut = Callable[[torch.Tensor], list[torch.Tensor]]
CUTS: tuple[Cut, ...] = (lambda whole: [whole[:3], whole[3:]], lambda whole: [whole[..., :3], whole[..., 3:]])


def fault(optimizer: torch.optim.Optimizer) -> str:
    """Why shards would not train as the whole does with ``optimizer``; empty if they would."""
    cls = type(optimizer)
    name = f"{cls.__module__}.{cls.__name__}"
    if getattr(cls, "tp_elementwise", False) or _is_known(cls):
        return ""
    settings = {repr(sorted(s.items(), key=lambda item: item[0])): s for s in map(_settings, optimizer.param_groups)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if all(_same(cls, given, parameters[0].device) for given in settings.values()):
            return ""
    except Exception as error:  # whatever its constructor or its step wants
        return (
            f"optimizer {name} is not known, and could not be tried ({type(error).__name__}: {error}). If it updates "
            f"each element by that element's gradients alone, say so: `{cls.__name__}.tp_elementwise = True`; else use "
            "one that does, such as AdamW, or tp_size: 1"
        )
    return (
        f"optimizer {name} gave other numbers for a matrix in two parts than for the whole matrix, so it looks at more "
        "than each element (rows, norms, averages), which no rank holds under tensor parallelism. Use an elementwise "
        "one such as AdamW, or Adafactor of transformers or torch, or tp_size: 1"
    )


def _is_known(cls: type) -> bool:
    step: Any = cls.step  # type: ignore[attr-defined]
    while getattr(step, "hooked", False):  # torch wraps it on the class of each instance
        step = step.__wrapped__
    owner = step.__qualname__.partition(".")[0]  # a subclass that inherits its step is what it inherits
    return owner in KNOWN.get(step.__module__.partition(".")[0], ())


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in group.items() if name not in ("params", "param_names", "initial_lr")}
    return found | ({"lr": 1e-2} if "lr" in found else {})  # a schedule may begin at 0


def _same(cls: type, settings: dict[str, Any], device: torch.device) -> bool:
    start = [tensor.to(device) for tensor in _random(0)]
    whole = _stepped(cls, settings, start, lambda tensor: [tensor])
    moved = max((a - b).abs().max().item() for a, b in zip(whole, start, strict=True))
    if not moved > 0:
        raise RuntimeError("its steps changed nothing")
    apart = [
        (a - b).abs().max().item()
        for cut in CUTS
        for a, b in zip(_stepped(cls, settings, start, cut), whole, strict=True)
    ]
    return max(apart) <= 1e-3 * moved


def _stepped(cls: type, settings: dict[str, Any], start: list[torch.Tensor], cut: Cut) -> list[torch.Tensor]:
    """A matrix and a vector after some steps in the parts that ``cut`` makes of them."""
    wholes = [tensor.clone() for tensor in start]
    parts = [[torch.nn.Parameter(part.clone()) for part in cut(whole)] for whole in wholes]
    device = start[0].device
    forks = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    with forks, torch.enable_grad():
        optimizer = cls([{"params": [part for of_one in parts for part in of_one], **settings}])
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # schedule-free ones
        for number, scale in enumerate(SCALES):
            for gradient, of_one in zip(_random(1 + number), parts, strict=True):
                for piece, part in zip(cut(gradient.to(device) * scale), of_one, strict=True):
                    part.grad = piece.clone()
            optimizer.step()
    for whole, of_one in zip(wholes, parts, strict=True):
        for view, part in zip(cut(whole), of_one, strict=True):
            view.copy_(part.detach())
    return wholes


def _random(seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for shape in ((6, 8), (8,)):
        yield torch.randn(shape, generator=generator, device="cpu")
