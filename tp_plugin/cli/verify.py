"""``tp-plugin verify``: what a policy does to a model, from its shapes alone, and then the proof that it is right."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from tp_plugin.cli.parity import Result, prove
from tp_plugin.cli.target import PROVEN_SIZE, build, find_policy, read_config, small_config
from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy import Plan, Policy, make_plan

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def verify(target: str, tp: int, reference: str | None, dry_run: bool) -> int:
    """Print the plan and the proof; returns the exit status: 0 if every number is inside its limit.

    Raises:
        PolicyError: no policy, or one that does not fit the model.
        TPError: no such model, or a rank of the proof failed.
    """
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    config = read_config(target)
    policy = find_policy(config, reference)
    if tp < 2:
        raise TPError(f"--tp {tp}: expected at least 2 ranks")
    model = build(config, meta=True)
    plan = make_plan(model, policy, tp)
    console.print(_layouts(model, plan))
    console.print(*_summary(model, config, policy, plan), sep="\n")
    if dry_run:
        return 0
    numel = sum(p.numel() for p in model.parameters())
    proven = config if numel <= PROVEN_SIZE else small_config(config)
    if numel > PROVEN_SIZE:
        console.print(f"The proof runs on a small {config.model_type} (this one has {numel / 1e6:,.0f} M parameters).")
    results = prove(proven, reference, tp)
    console.print(_proof(results))
    failures = {failure for result in results for failure in result.failures()}
    for failure in sorted(failures):
        console.print(f"[red]FAILED[/red]: {failure}", highlight=False)
    if not failures:
        console.print(f"Right at tp={tp}: every number is inside its limit.")
    return 1 if failures else 0


def _layouts(model: nn.Module, plan: Plan) -> Table:
    """Each parameter once per kind of layer: its whole shape, how it lies, what each rank holds."""
    table = Table(Column("parameter", overflow="fold"), "whole", "layout", *(f"rank {r}" for r in range(plan.tp)))
    rows: dict[tuple[str, ...], int] = Counter()
    for name, parameter in model.named_parameters():
        layout = plan.layouts[name]
        shapes = [_shape(layout.local_shape(rank)) for rank in range(plan.tp)]
        rows[(re.sub(r"\.\d+\.", ".*.", name), _shape(parameter.shape), _kind(name, plan), *shapes)] += 1
    for (name, *rest), count in rows.items():
        table.add_row(name if count == 1 else f"{name} (× {count})", *rest)
    return table


def _kind(name: str, plan: Plan) -> str:
    module, layout = name.rpartition(".")[0], plan.layouts[name]
    if not layout.is_sharded:
        return "replicated, gradients summed" if name in plan.partial else "replicated"
    kinds = {"column-parallel": plan.columns, "row-parallel": plan.rows, "vocabulary": plan.embeddings + plan.heads}
    kind = next((kind for kind, modules in kinds.items() if module in modules), "per head")
    return f"{kind}, partly replicated" if layout.replica_groups else kind


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _summary(model: nn.Module, config: Any, policy: Policy, plan: Plan) -> list[str]:
    parameters = dict(model.named_parameters())
    share = plan.sharded_share(parameters)
    held = max(sum(plan.layouts[name].local_numel(rank) for name in parameters) for rank in range(plan.tp))
    blocks, vocabulary = len(plan.blocks), len(plan.embeddings)
    hidden = getattr(config, "hidden_size", None)
    lines = [
        f"{share:.1%} of {sum(p.numel() for p in parameters.values()):,} parameters are sharded; "
        f"a rank holds at most {held:,}.",
        f"Legal tp sizes (of {', '.join(map(str, SIZES))}): {', '.join(map(str, _legal(model, policy))) or 'none'}.",
        f"All-reduces per micro-batch: {blocks + vocabulary} forward, {blocks + len(plan.heads)} backward"
        + (f", each of {hidden} elements per token" if hidden else "")
        + (f"; {len(plan.heads)} all-gather of the logits" if plan.heads else "")
        + (f"; {len(plan.partial)} of whole replicated gradients" if plan.partial else "")
        + (f"; {2 * len(plan.wide_norms)} of one number per token for wide norms" if plan.wide_norms else "")
        + ".",
    ]
    if share == 0:
        lines.append("[red]Nothing is sharded: this policy only replicates the model.[/red]")
    return lines


def _legal(model: nn.Module, policy: Policy) -> list[int]:
    legal = []
    for size in SIZES:
        try:
            make_plan(model, policy, size)
        except PolicyError:
            continue
        legal.append(size)
    return legal


def _proof(results: list[Result]) -> Table:
    table = Table("rank", "outputs", "loss", "worst gradient", "norm", "weights", "generate()", "saved state")
    for rank, result in enumerate(results):
        words = {None: "-", True: "equal", False: "DIFFERS"}
        table.add_row(
            str(rank), f"{result.output:.1e}", f"{result.loss:.1e}",
            f"{result.gradient:.1e} {result.where.get('gradient', '')}", f"{result.norm:.1e}", f"{result.weight:.1e}",
            words[result.generation], words[result.state],
        )  # fmt: skip
    return table
