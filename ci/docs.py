"""Write what programs write of the docs: the tables of options and commands, and the figures.

    python ci/docs.py            # the tables
    python ci/docs.py --figures  # the figures, too (needs matplotlib)

Tables of what is proven have programs of their own: ci/zoo.py, ci/combinations.py, ci/compat.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
VALUES = {
    **{"int": "whole number", "float": "number", "bool": "true, false", "str | None": "text"},
    **{"pipeline_microbatches": "auto, whole number", "pipeline_schedule": "auto, 1f1b, gpipe"},
    **{"pipeline_split": "auto, list", "dropout": "exact, sharded"},
    **{"tuple[str, ...]": "list", "guard": "always, off, whole number", "report": "on, off"},
}
"""What is written for a field of a type, or of this name."""

WORDS = {"guard": "always", "report": "on", "pipeline_microbatches": "auto", "pipeline_split": "auto"}
"""Defaults that are written as a word."""

OFF = ("TP_PLUGIN_SUMMARISED",)
"""Variables that programs tell each other, and nobody sets."""


def options() -> str:
    """Every key of the mapping ``tp_plugin``: from the attributes of ``RunConfig``."""
    from tp_plugin.config.run_config import RunConfig

    described = dict(_attributes(RunConfig.__doc__ or ""))
    lines = ["| key | value | default | effect |", "|---|---|---|---|"]
    for field in dataclasses.fields(RunConfig):
        if field.name in ("tp_size", "pp_size"):  # which stand beside the mapping
            continue
        words = {True: "true", False: "false", None: "none", (): "none"}
        default = WORDS.get(field.name) or field.default
        default = default if default not in words or field.type == "int" else words[default]
        kind = VALUES.get(field.name) or VALUES[str(field.type)]
        lines.append(f"| `{field.name}` | {kind} | {default} | {_code(described[field.name])} |")
    return "\n".join(lines)


def variables() -> str:
    """Every environment variable: from ``config/keys.py``."""
    body = ast.parse((ROOT / "tp_plugin/config/keys.py").read_text(encoding="utf-8")).body
    lines = ["| variable | meaning |", "|---|---|"]
    for node, after in itertools.pairwise(body):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(after, ast.Expr)):
            continue
        if node.targets[0].id.startswith("ENV_") and (name := ast.literal_eval(node.value)) not in OFF:
            lines.append(f"| `{name}` | {_code(ast.literal_eval(after.value))} |")
    return "\n".join(lines)


def commands() -> str:
    """Every subcommand of ``tp-plugin`` with its arguments: from its parser."""
    from tp_plugin.cli.main import _parser

    (subcommands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in subcommands._choices_actions}
    parts = []
    for name, parser in subcommands.choices.items():
        lines = [f"## tp-plugin {name}", "", f"{_sentence(helps[name])}", "", "| argument | meaning |", "|---|---|"]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            shown = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
            lines.append(f"| {shown} | {_code(_sentence(action.help or ''))} |")
        parts.append("\n".join(lines if len(lines) > 6 else lines[:3]))
    return "\n\n".join(parts)


def _attributes(docstring: str) -> Iterator[tuple[str, str]]:
    _, _, rest = docstring.partition("Attributes:")
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", rest, re.MULTILINE):
        yield name, _sentence(" ".join(text.split()))


def _sentence(text: str) -> str:
    text = text.strip().removesuffix(".")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _code(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("\n", " ")


def results() -> str:
    """What the benchmarks found last: ``ci/bench/results``, largest headings one level down."""
    files = [ROOT / "ci" / "bench" / "results" / f"{name}.md" for name in ("step", "growth", "idle", "gpu")]
    texts = [file.read_text(encoding="utf-8").strip() for file in files if file.exists()]
    return "\n\n".join(re.sub(r"^#", "##", text, flags=re.MULTILINE) for text in texts)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "options": ("reference/options.md", options),
    "variables": ("reference/options.md", variables),
    "commands": ("reference/cli.md", commands),
    "results": ("performance.md", results),
}


def with_table(text: str, name: str, table: str) -> str:
    """``text`` with the table between its markers."""
    begin, end = f"<!-- {name}: written by ci/docs.py -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    if end not in rest:
        raise SystemExit(f"no lines {begin} and {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Write the tables, and the figures if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", action="store_true", help="draw the figures, too")
    if parser.parse_args().figures:
        sys.path.insert(0, str(ROOT / "ci"))
        import figures

        figures.draw(DOCS / "figures")
    for name, (page, make) in TABLES.items():
        path = DOCS / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
