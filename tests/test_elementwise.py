"""Optimizers that nobody here knows: tried before they train shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tp_plugin.shard.elementwise import fault


class Base(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + 0.1 * p.grad
                p -= group["lr"] * (self.direction(p, state["mean"]) + group["decay"] * p)

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Sign(Base):
    """Lion's kind."""

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return torch.sign(mean + 0.1 * p.grad)


class Trust(Base):
    """LAMB's and LARS' kind: the norm of a whole tensor."""

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return mean * p.norm() / mean.norm()


class Clipped(Base):
    """Each gradient clipped to a root mean square (StableAdamW); unseen while gradients are small."""

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return mean / max(1.0, mean.pow(2).mean().sqrt().item())


class Rotated(Base):
    """GaLore's kind: a projection of the matrix."""

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        if mean.dim() < 2:
            return mean
        u, _, v = torch.linalg.svd(mean, full_matrices=False)
        return u @ v


class Global(Base):
    """Prodigy's kind: one number of all parameters."""

    def step(self, closure: Any = None) -> None:
        super().step()

    def direction(self, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        first = self.param_groups[0]["params"][0]
        return mean * first.grad.abs().max()


class Sharpness(Base):
    """SAM's kind: its step wants a closure."""

    def step(self, closure: Any = None) -> None:
        closure()


class Vouched(Sharpness):
    tp_elementwise = True


class Inherited(torch.optim.AdamW):
    """A subclass that only chooses settings."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-3)


class Changed(torch.optim.AdamW):
    """A subclass with a step of its own, which normalizes gradients first."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm()
        return super().step(closure)


def made(cls: Any, **given: Any) -> torch.optim.Optimizer:
    return cls([{"params": [torch.nn.Parameter(torch.ones(3, 2))], "lr": 0.0, "initial_lr": 1.0}], **given)


def test_elementwise_ones_are_taken() -> None:
    for cls in (Sign, Vouched, torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop):
        optimizer = made(cls)
        optimizer.step = optimizer.step  # type: ignore[method-assign]  # as a scheduler wraps it
        assert fault(optimizer) == ""
    assert fault(made(Sign, decay=0.1)) == ""
    assert fault(Inherited(torch.nn.Linear(2, 2))) == ""


@pytest.mark.parametrize("cls", [Trust, Clipped, Rotated, Global, Changed])
def test_those_that_look_further_are_refused(cls: Any) -> None:
    assert f"test_elementwise.{cls.__name__} gave other numbers for a matrix in two parts" in fault(made(cls))


def test_what_cannot_be_tried_is_refused() -> None:
    why = fault(made(Sharpness))
    assert "could not be tried (TypeError: 'NoneType' object is not callable)" in why
    assert "`Sharpness.tp_elementwise = True`" in why


def test_a_trial_leaves_no_trace() -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    optimizer = made(Sign)
    fault(optimizer)
    assert torch.equal(torch.rand(1), expected) and not optimizer.state
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(3, 2))
