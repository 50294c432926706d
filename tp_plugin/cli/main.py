"""The command line: ``tp-plugin policies``, ``plan``, ``verify``, ``export`` and ``reshard``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tp_plugin.config.keys import ENV_DISABLE
from tp_plugin.errors import TPError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # the tool itself is one plain process
    before, os.environ[ENV_DISABLE] = os.environ.get(ENV_DISABLE, ""), "1"
    try:
        return _run(arguments)
    except TPError as error:
        print(f"tp-plugin {arguments.command}: {error}", file=sys.stderr)
        return 2 if arguments.command == "plan" else 1
    finally:
        os.environ[ENV_DISABLE] = before


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tp-plugin", description="Tensor parallelism for Hugging Face scripts.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("policies", help="list the architectures that have a policy")

    verify = commands.add_parser("verify", help="show what a policy does to a model, and prove it on local ranks")
    verify.add_argument("target", help="model type, config.json or local checkpoint folder")
    verify.add_argument("--tp", type=int, default=2, help="ranks of the TP group; default 2")
    verify.add_argument("--policy", help="module:NAME or path/to/file.py:NAME; default the registered one")
    verify.add_argument("--expert-parallel", action="store_true", help="split a mixture of experts by whole experts")
    verify.add_argument("--dry-run", action="store_true", help="only the plan, no proof")

    from tp_plugin.cli.plan_arguments import add_arguments

    add_arguments(commands.add_parser("plan", help="say what fits a cluster and how fast it is, before the launch"))

    export = commands.add_parser("export", help="turn a checkpoint into a plain Hugging Face model")
    reshard = commands.add_parser("reshard", help="rewrite a checkpoint for another tp_size and dp size")
    for command in (export, reshard):
        command.add_argument(
            "checkpoint",
            type=Path,
            help="folder given to save_checkpoint (or a tag of it) or save_state, or a Trainer's",
        )
        command.add_argument("output", type=Path, help="folder to write; must not hold anything yet")
        command.add_argument("-t", "--tag", help="tag to read; default the one in the file `latest`")
        command.add_argument(
            "--trust",
            action="store_true",
            help="read pickles that use unknown classes, which can run any code; only if you know who wrote them",
        )
    export.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    export.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="largest file; default 5")
    reshard.add_argument("--tp", type=int, required=True, help="tp_size of the run that resumes")
    reshard.add_argument("--dp", type=int, help="its data-parallel size; default: as many processes as saved it")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "policies":
        return _policies()
    if arguments.command == "plan":
        from tp_plugin.cli.plan_report import run

        return run(arguments)
    if arguments.command == "verify":
        from tp_plugin.cli.verify import verify

        return verify(
            arguments.target,
            arguments.tp,
            arguments.policy,
            dry_run=arguments.dry_run,
            expert_parallel=arguments.expert_parallel,
        )
    if arguments.command == "export":
        from tp_plugin.cli.export import export

        size = int(arguments.max_shard_size * 10**9)
        if size <= 0:
            raise TPError(
                f"--max-shard-size {arguments.max_shard_size:g}: expected a size in GB above 0, for example 5"
            )
        export(arguments.checkpoint, arguments.output, arguments.tag, arguments.dtype, size, trust=arguments.trust)
        return 0
    from tp_plugin.cli.reshard import reshard

    sizes = arguments.tp, arguments.dp
    reshard(arguments.checkpoint, arguments.output, arguments.tag, *sizes, trust=arguments.trust)
    return 0


def _policies() -> int:
    from rich.console import Console
    from rich.table import Table

    from tp_plugin.cli.models import typical_share
    from tp_plugin.policy import policies

    def flat(name: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return name if isinstance(name, tuple) else (name,) if name else ()

    import transformers

    transformers.logging.set_verbosity_error()  # remarks on default configs
    table = Table("model type", "sharded", "blocks", "vocabulary", title="Architectures with a tensor-parallel policy")
    for model_type, policy in sorted(policies().items()):
        blocks = [
            f"{b.path}: {', '.join([*b.columns, *b.tensors])} → {', '.join(b.row) or 'sum'}" for b in policy.blocks
        ]
        vocabulary = policy.vocabulary
        names = [*flat(vocabulary.embedding), *flat(vocabulary.head)] if vocabulary else []
        share = typical_share(model_type)
        shown = "-" if share is None else f"{share:.1%}"
        table.add_row(model_type, shown, "\n".join(blocks), ", ".join(names))
    Console(file=sys.stdout).print(table)
    return 0
