"""The command line: ``tp-plugin policies``, ``plan``, ``verify``, ``doctor``, ``export`` and ``reshard``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tp_plugin.config.keys import ENV_DISABLE
from tp_plugin.errors import TPError

if TYPE_CHECKING:
    from rich.table import Table

    from tp_plugin.policy import Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = _parser().parse_args(argv)
    arguments.environ = dict(os.environ)
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
    listed = commands.add_parser("policies", help="list the architectures that have a policy")
    listed.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="show what is split of these")
    listed.add_argument("--long", action="store_true", help="show what is split of all")

    verify = commands.add_parser("verify", help="show what a policy does to a model, and prove it on local ranks")
    verify.add_argument("target", help="model type, config.json or local checkpoint folder")
    verify.add_argument("--tp", type=int, default=2, help="ranks of the TP group; default 2")
    verify.add_argument("--pp", type=int, default=1, help="pipeline stages; default 1; --tp may then be 1")
    verify.add_argument("--policy", help="module:NAME or path/to/file.py:NAME; default the registered one")
    verify.add_argument("--expert-parallel", action="store_true", help="split a mixture of experts by whole experts")
    verify.add_argument("--dry-run", action="store_true", help="only the plan, no proof")
    verify.add_argument("--json", action="store_true", help="print JSON, for programs")

    doctor = commands.add_parser("doctor", help="look for what would keep tp_size from working here")
    doctor.add_argument("config", nargs="?", type=Path, help="Accelerate or DeepSpeed config file to look at, too")
    doctor.add_argument("--report", type=Path, metavar="FILE", help="write it to a file, for a bug report")

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
        return _policies(arguments.model_types, arguments.long)
    if arguments.command == "doctor":
        from tp_plugin.cli.doctor import doctor

        return doctor(arguments.config, arguments.report, arguments.environ)
    if arguments.command == "plan":
        from tp_plugin.cli.plan_report import run

        return run(arguments)
    if arguments.command == "verify":
        from tp_plugin.cli.verify import verify

        return verify(
            arguments.target,
            arguments.tp,
            arguments.policy,
            pp=arguments.pp,
            dry_run=arguments.dry_run,
            expert_parallel=arguments.expert_parallel,
            as_json=arguments.json,
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


def _policies(model_types: Sequence[str], long: bool) -> int:
    from rich.console import Console

    from tp_plugin.policy import policies

    known = policies()
    for model_type in model_types:
        if model_type not in known:
            raise TPError(f"no policy for {model_type!r}; `tp-plugin policies` lists those that there are")
    console = Console(file=sys.stdout, highlight=False)
    if model_types or long:
        console.print(_what_is_split({name: known[name] for name in model_types or sorted(known)}))
        return 0
    console.print(", ".join(sorted(known)))
    console.print(
        f"{len(known)} model types. `tp-plugin policies MODEL_TYPE` shows what is split; other types that transformers "
        "has a tensor-parallel plan for are sharded by it (`tp-plugin verify MODEL_TYPE` proves it)."
    )
    return 0


def _what_is_split(chosen: Mapping[str, Policy]) -> Table:
    """A row for each model type; names are folded, never cut."""
    from rich.table import Column, Table

    from tp_plugin.cli.models import typical_share

    def flat(name: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return name if isinstance(name, tuple) else (name,) if name else ()

    import transformers

    transformers.logging.set_verbosity_error()  # remarks on default configs
    columns = [Column(name, overflow="fold") for name in ("model type", "sharded", "blocks", "vocabulary")]
    table = Table(*columns, title="What is split")
    for model_type, policy in chosen.items():
        blocks = [
            f"{b.path}: {', '.join([*b.columns, *b.tensors])} → {', '.join(b.row) or 'sum'}" for b in policy.blocks
        ]
        vocabulary = policy.vocabulary
        names = [*flat(vocabulary.embedding), *flat(vocabulary.head)] if vocabulary else []
        share = typical_share(model_type)
        shown = "-" if share is None else f"{share:.1%}"
        table.add_row(model_type, shown, "\n".join(blocks), ", ".join(names))
    return table
