"""Print the table of what combines with what; --write puts it into the docs: python ci/combinations.py [--write]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    """Exit status: 0 if each cell's test is there."""
    import combinations_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    if parser.parse_args().write:
        combinations_table.write()
    print(combinations_table.table())
    for name in (absent := combinations_table.missing()):
        print(f"no such test: {name}", file=sys.stderr)
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
