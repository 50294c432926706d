"""Keys that look like one of ours and are none: "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tp_plugin.config.keys import KEYS, TP_SIZE
from tp_plugin.errors import TPError

ALIASES = {
    alias: key
    for key, word in ((TP_SIZE, "tensor"), ("pp_size", "pipeline"))
    for alias in (
        *(f"{word}_{form}" for form in ("parallel_size", "parallelism_size", "model_parallel_size", "parallel_degree")),
        f"{key.partition('_')[0]}_degree",
    )
    if key in KEYS
}
"""What other programs call our sizes → our key."""


def meant(key: str) -> str:
    """The key that somebody who wrote ``key`` meant, "" if it is one of ours, or like none of them."""
    if key in KEYS:
        return ""
    letters = _letters(key)
    for alias, ours in ALIASES.items():
        if letters == _letters(alias):
            return ours
    for ours in KEYS:
        theirs = _letters(ours)
        # another letter would make another key of somebody else's (cp_size); two in the wrong order would not
        swapped = sorted(letters) == sorted(theirs)
        if swapped or difflib.SequenceMatcher(None, letters, theirs).ratio() > 0.9:
            return ours
    return ""


def refuse_misspelt(keys: Iterable[object], origin: str) -> None:
    """Raise TPError for the first key in ``origin`` that was meant to be one of ours."""
    for key in keys:
        if isinstance(key, str) and (ours := meant(key)):
            raise TPError(f"unknown key `{key}` in {origin}: did you mean `{ours}`?")


def suggestion(key: object, known: Iterable[str]) -> str:
    """``: did you mean `…`?`` for the known name that is most like ``key``, or "" if none is."""
    by_letters = {_letters(name): name for name in known}
    found = difflib.get_close_matches(_letters(str(key)), by_letters, n=1, cutoff=0.75)
    return f": did you mean `{by_letters[found[0]]}`?" if found else ""


def _letters(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")
