"""What the proof of a policy finds on one rank, and the limits that its numbers must keep."""

from __future__ import annotations

from dataclasses import dataclass, field

LIMITS = {"output": 1e-4, "loss": 1e-5, "gradient": 1e-4, "norm": 1e-5, "weight": 3e-4}
"""Largest deviations in fp32: relative, except of weights (absolute, after the steps)."""


@dataclass
class DropoutResult:
    """What one rank found with dropout on.

    Attributes:
        equal: names in the config of dropouts that give one process' loss exactly (up to the order of additions).
        own: names of those that each rank draws for its own share.
        faults: what is wrong, in words.
    """

    equal: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Result:
    """Deviations of the sharded model from the whole one, as one rank sees them.

    Attributes:
        output, loss, gradient, norm, weight: the largest deviation of each kind; limits: :data:`LIMITS`.
        where: the module or parameter of each.
        hints: what may be wrong there.
        generation: whether greedy generation gives the same tokens; None if it was not tried.
        state: whether the saved state is the whole model's; None if it was not tried.
        collectives: those of one forward and backward, by operation and group.
        sent: the bytes that a rank puts into them.
        norms: the gradient norms of the steps.
        moved: how far training took the weights (a model that does not move proves nothing).
        dropout: the proof with dropout on, where the one without it succeeded.
    """

    output: float = 0.0
    loss: float = 0.0
    gradient: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    where: dict[str, str] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)
    generation: bool | None = None
    state: bool | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    moved: float = 0.0
    dropout: DropoutResult | None = None

    def note(self, kind: str, deviation: float, where: str) -> None:
        """Keep ``deviation`` if it is the largest of its kind so far; not-a-number is larger than any."""
        if kind not in self.where or not deviation <= getattr(self, kind):
            setattr(self, kind, deviation)
            self.where[kind] = where

    def failures(self) -> list[str]:
        """What is beyond its limit, each with the place."""
        found = [
            f"{kind} deviates by {getattr(self, kind):.1e} (limit {limit:.0e}) at {self.where.get(kind, '?')}"
            + (f"; {self.hints[kind]}" if self.hints.get(kind) else "")
            for kind, limit in LIMITS.items()
            if not getattr(self, kind) <= limit
        ]
        if self.generation is False:
            found.append("greedy generation gives other tokens")
        if self.state is False:
            found.append(f"the saved state differs from the whole model's: {self.where.get('state')}")
        if self.dropout is not None:
            found += self.dropout.faults
        return found
