"""Links from the docs to files beside them (tests, examples, code): on the site, their paths as a hint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#:]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace what leads out of ``docs``; a file that is not there is left, for mkdocs to complain about."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[2]))
        if not target.exists() or target.is_relative_to(ROOT / "docs"):
            return link[0]
        path = target.relative_to(ROOT)
        return f'<span title="{path}">{link[1]}</span>' if link[1] in ("✓", "test") else f"{link[1]} (`{path}`)"

    return LINK.sub(shown, markdown)
