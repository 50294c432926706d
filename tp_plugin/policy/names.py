"""Paths of modules and names of parameters, and the patterns by which policies speak of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache


def prefixes(name: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(1, len(parts) + 1))


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> re.Pattern[str]:
    body = r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split("."))
    return re.compile(rf"(?:^|.*\.){body}")


def matches(pattern: str, path: str) -> bool:
    """Whether a policy's ``pattern`` (``*`` is one part) is the end of ``path``, or all of it."""
    return _pattern(pattern).fullmatch(path) is not None
