"""How many collectives this rank has begun, over which role of ranks, and with how many bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Calls, and bytes of this rank's input, of each collective; keyed ``"<op>/<role>"`` (``"all_reduce/tp"``)."""

    count: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        self.count.clear()
        self.bytes.clear()

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{"<op>/<role>": {"count": …, "bytes": …}}``, sorted, for a report."""
        return {key: {"count": count, "bytes": self.bytes[key]} for key, count in sorted(self.count.items())}


class CommStats:
    """The ledgers of one process.

    Attributes:
        total: everything since the groups were made.
        training: what belongs to training: from a training forward up to the next forward of another kind.
        in_training: whether collectives are booked in ``training``, too.
        unit_collectives: collectives of the whole unit that this rank has begun; equal on its ranks at equal points of
            the program.
    """

    def __init__(self) -> None:
        self.total, self.training = Ledger(), Ledger()
        self.in_training = False
        self.unit_collectives = 0

    def record(self, op: str, role: str, size: int) -> None:
        """Book one collective of ``size`` bytes."""
        key = f"{op}/{role}"
        for ledger in (self.total, self.training) if self.in_training else (self.total,):
            ledger.count[key] += 1
            ledger.bytes[key] += size
