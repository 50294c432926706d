"""What this rank's collectives were, for tests: ``ledger["count"]["all_reduce/tp"]``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tp_plugin.runtime.runtime import current


class _Ledger:
    """The ledger of the Runtime that is running; empty without one."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, book: str) -> Counter[str]:
        runtime = current()
        return Counter() if runtime is None else getattr(getattr(runtime.mesh.context.stats, self.name), book)

    def __iter__(self) -> Iterator[str]:
        return iter(("count", "bytes"))

    def values(self) -> list[Counter[str]]:
        return [self[book] for book in self]

    def items(self) -> list[tuple[str, Counter[str]]]:
        return [(book, self[book]) for book in self]


ledger = _Ledger("total")
training = _Ledger("training")
