"""The docs: written tables are up to date, links lead somewhere, every page is found, the README is short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tp_plugin.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "ci"))
import docs as writer  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain ones."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", writer.TABLES)
def test_tables_are_what_their_program_writes(name: str) -> None:
    """Anew: python ci/docs.py"""
    page, make = writer.TABLES[name]
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == writer.with_table(text, name, make())


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = Path(os.path.normpath(page.parent / file)) if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w\-/]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
    assert list(yaml.safe_load(text)["nav"][0]) == ["Start"]


def test_figures_are_named() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {figure.name for figure in (DOCS / "figures").iterdir()} == set(re.findall(r"figures/(\w+\.svg)", text))


def test_every_option_is_shown() -> None:
    options = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in options for name in RunConfig.__dataclass_fields__)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 110


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
