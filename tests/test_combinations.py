"""The docs' table of what combines with what names tests that exist, and is the one that they make."""

from __future__ import annotations

import combinations_table


def test_every_cell_names_a_test() -> None:
    assert combinations_table.missing() == []


def test_the_docs_have_this_table() -> None:
    assert combinations_table.written() == combinations_table.table(), "run python ci/combinations.py --write"
