"""The command line: ``tp-plugin policies`` lists the architectures with a policy and what each shards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    os.environ["TP_PLUGIN_DISABLE"] = "1"  # the tool itself is one plain process
    parser = argparse.ArgumentParser(prog="tp-plugin", description="Tensor parallelism for Hugging Face scripts.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("policies", help="list the architectures that have a policy")
    parser.parse_args(argv)
    return _policies()


def _policies() -> int:
    from rich.console import Console
    from rich.table import Table

    from tp_plugin.policy import policies

    table = Table("model type", "blocks", "vocabulary", title="Architectures with a tensor-parallel policy")
    for model_type, policy in sorted(policies().items()):
        blocks = [f"{b.path}: {', '.join(b.columns)} → {', '.join(b.row)}" for b in policy.blocks]
        vocabulary = policy.vocabulary
        names = [n for n in (vocabulary.embedding, vocabulary.head) if n] if vocabulary else []
        table.add_row(model_type, "\n".join(blocks), ", ".join(names))
    Console(file=sys.stdout).print(table)
    return 0
