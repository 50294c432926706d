"""``tp-plugin verify``: what a policy does to a model, from its shapes alone, and then the proof that it is right."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from tp_plugin.cli import verify_stages
from tp_plugin.cli.models import DEPTHS, PROVEN_SIZE, build, named_policy, read_config, small_config
from tp_plugin.cli.parity_result import Result
from tp_plugin.cli.proof import prove
from tp_plugin.config.keys import ENV_OPTIONS
from tp_plugin.config.resolve import current_config
from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy import Plan, Policy, make_plan, policy_for
from tp_plugin.shard.find_stages import find_stages

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def verify(
    target: str,
    tp: int,
    reference: str | None,
    *,
    pp: int = 1,
    dry_run: bool = False,
    expert_parallel: bool = False,
    as_json: bool = False,
) -> int:
    """Print the plan and the proof; returns the exit status: 0 if every number is inside its limit.

    Raises:
        PolicyError: no policy, or one that does not fit the model.
        TPError: no such model, or a rank of the proof failed.
    """
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 160)))
    named = named_policy(reference) if reference else None  # first: its module may bring the architecture
    config = read_config(target)
    policy = named or policy_for(config)
    if min(tp, pp) < 1 or tp * pp < 2:
        raise TPError(f"--tp {tp} --pp {pp}: expected at least 2 ranks in all")
    try:
        model = build(config, meta=True)
    except TPError:
        raise
    except (TypeError, ValueError) as error:
        raise TPError(f"{target}: its config makes no model ({error}); name a config.json or a checkpoint") from error
    plan = make_plan(model, policy, tp, expert_parallel=expert_parallel)
    stages = find_stages(model, plan, pp, current_config().pipeline_split) if pp > 1 else None
    if not as_json:
        if tp > 1:
            console.print(_layouts(model, plan))
            console.print(*_summary(model, config, policy, plan), sep="\n")
        if stages is not None:
            console.print(verify_stages.table(model, plan, stages))
            console.print(verify_stages.traffic(config, stages))
    failures: list[str] = []
    results: list[Result] = []
    if not dry_run:
        numel = sum(p.numel() for p in model.parameters())
        proven = config if numel <= PROVEN_SIZE else small_config(config, **_depth(config, pp))
        if numel > PROVEN_SIZE and not as_json:
            console.print(
                f"The proof runs on a small {config.model_type} (this one has {numel / 1e6:,.0f} M parameters)."
            )
        options = dataclasses.replace(current_config(), expert_parallel=expert_parallel)
        if numel > PROVEN_SIZE:
            options = dataclasses.replace(options, pipeline_split=())  # which counts the layers of the large one
        os.environ[ENV_OPTIONS] = json.dumps(options.as_written().options)  # for the ranks
        results = prove(proven, reference, tp, pp)
        failures = list(dict.fromkeys(failure for result in results for failure in result.failures()))
    if as_json:
        told = {"model_type": config.model_type, "tp": tp, **_as_data(model, policy, plan)}
        if stages is not None:
            told |= {"pp": pp, "stages": verify_stages.as_data(model, plan, stages)}
        if not dry_run:
            told["failures"] = failures
        print(json.dumps(told, indent=2))
    elif not dry_run:
        _print_proof(console, results, failures, tp, pp)
    return 1 if failures else 0


def _print_proof(console: Console, results: list[Result], failures: list[str], tp: int, pp: int) -> None:
    console.print(_proof(results))
    sent = results[0].sent
    console.print(
        "Measured in the proof, for one forward and backward in fp32: "
        + "; ".join(
            f"{n} {op.partition('/')[0]} of {sent[op]:,} bytes" for op, n in results[0].collectives.items() if sent[op]
        )
        + ".",
        highlight=False,
    )
    dropout = results[0].dropout
    if dropout is not None and not dropout.faults and (dropout.equal or dropout.own):
        parts = [f"{', '.join(dropout.equal)}: the masks of one process"] if dropout.equal else []
        parts += [f"{', '.join(dropout.own)}: each rank's own masks"] if dropout.own else []
        console.print(f"With dropout, {'; '.join(parts)}; the ranks stay one model.", highlight=False)
    for failure in failures:
        console.print(f"[red]FAILED[/red]: {failure}", highlight=False)
    if not failures:
        sizes = f"tp={tp}" + (f", pp={pp}" if pp > 1 else "")
        console.print(f"Right at {sizes}: every number is inside its limit.")


def _depth(config: Any, pp: int) -> dict[str, int]:
    """A small model's layers: two for each stage; as many as it has by default without stages."""
    name = next((name for name in DEPTHS if name in vars(config.get_text_config())), None)
    return {name: 2 * pp} if pp > 1 and name else {}


class Row(NamedTuple):
    """Parameters that are alike but for the number of their layer: what each rank holds of one."""

    name: str
    whole: str
    layout: str
    ranks: tuple[str, ...]


def _rows(model: nn.Module, plan: Plan) -> dict[Row, int]:
    """Each parameter once per kind of layer, and how many there are."""
    rows: dict[Row, int] = Counter()
    for name, parameter in model.named_parameters():
        layout = plan.layouts[name]
        shapes = tuple(_shape(layout.local_shape(rank)) for rank in range(plan.tp))
        rows[Row(re.sub(r"\.\d+\.", ".*.", name), _shape(parameter.shape), _kind(name, plan), shapes)] += 1
    return rows


def _layouts(model: nn.Module, plan: Plan) -> Table:
    """One column for ranks that hold the same shape of everything."""
    rows = _rows(model, plan)
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank in range(plan.tp):
        alike.setdefault(tuple(row.ranks[rank] for row in rows), []).append(rank)
    columns = [Column("each rank" if len(alike) == 1 else _ranks(ranks)) for ranks in alike.values()]
    table = Table(Column("parameter", overflow="fold"), "whole", "layout", *columns)
    for row, count in rows.items():
        held = [row.ranks[ranks[0]] for ranks in alike.values()]
        table.add_row(row.name if count == 1 else f"{row.name} (× {count})", row.whole, row.layout, *held)
    return table


def _ranks(ranks: list[int]) -> str:
    """``rank 0``, ``ranks 0–3, 6``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    words = ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def _as_data(model: nn.Module, policy: Policy, plan: Plan) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    forward, backward = elements(plan)
    up, down = plan.reductions()
    return {
        "parameters": [{**row._asdict(), "count": count} for row, count in _rows(model, plan).items()],
        "numel": sum(p.numel() for p in parameters.values()),
        "numel_of_rank": [sum(plan.layouts[n].local_numel(r) for n in parameters) for r in range(plan.tp)],
        "sharded_share": plan.sharded_share(parameters),
        "legal_tp_sizes": _legal(model, policy),
        "all_reduces": {"forward": up, "backward": down},
        "numbers_per_token": {"forward": forward, "backward": backward},
    }


def _kind(name: str, plan: Plan) -> str:
    module, layout = name.rpartition(".")[0], plan.layouts[name]
    if not layout.is_sharded:
        return "replicated, gradients summed" if name in plan.partial else "replicated"
    kinds = {"column-parallel": plan.columns, "row-parallel": plan.rows, "vocabulary": plan.embeddings + plan.heads}
    kind = next((kind for kind, modules in kinds.items() if module in modules), "per head")
    if module in plan.blocks and plan.blocks[module].output_is_partial:
        kind = "whole experts" if plan.blocks[module].experts else "inside each expert"
    return f"{kind}, partly replicated" if layout.replica_groups else kind


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _summary(model: nn.Module, config: Any, policy: Policy, plan: Plan) -> list[str]:
    parameters = dict(model.named_parameters())
    share = plan.sharded_share(parameters)
    held = max(sum(plan.layouts[name].local_numel(rank) for name in parameters) for rank in range(plan.tp))
    up, down = plan.reductions()
    biases = sum(len(block.head_inputs) for block in plan.blocks.values())
    # several may be names of one tied embedding, of which the model need not use all
    forward = f"{'at most ' if len(plan.embeddings) > 1 else ''}{up}"
    # the two blocks of a parallel residual need not have one input
    backward = f"{'at most ' if plan.parallel_residual else ''}{down}"
    hidden = getattr(config, "hidden_size", None)
    lines = [
        f"{share:.1%} of {sum(p.numel() for p in parameters.values()):,} parameters are sharded; "
        f"a rank holds at most {held:,}.",
        f"Legal tp sizes (of {', '.join(map(str, SIZES))}): {', '.join(map(str, _legal(model, policy))) or 'none'}.",
        f"All-reduces per micro-batch: {forward} forward, {backward} backward"
        + (f", each of {hidden} elements per token" if hidden else "")
        + ("; one all-gather of three numbers per token for the loss" if plan.heads else "")
        + (f"; at most {biases} of gradients of position biases" if biases else "")
        + (f"; {_sums(plan)}" if plan.gradient_sums() else "")
        + (f"; {2 * len(plan.sharded_norms)} of one number per token for sharded norms" if plan.sharded_norms else "")
        + ".",
        _bytes(model, plan),
    ]
    if share == 0:
        lines.append("[red]Nothing is sharded: this policy only replicates the model.[/red]")
    return lines


def _sums(plan: Plan) -> str:
    count = len(plan.gradient_sums())
    what = "one parameter" if count == 1 else f"{count} parameters"
    return f"one of the gradients of {what} that all ranks hold (ZeRO: one for each; FSDP2: one for each of its groups)"


def _bytes(model: nn.Module, plan: Plan) -> str:
    """What a rank puts into the all-reduces of activations, and of gradients that are parts of a sum."""
    forward, backward = elements(plan)
    sums = sum(4 * math.prod(plan.layouts[name].local_shape(0)) for name in plan.gradient_sums())
    return (
        f"Bytes that a rank puts into them: {2 * forward:,} forward, {2 * backward:,} backward per token in bf16, "
        "twice that in fp32" + (f"; {sums:,} for gradients in fp32" if sums else "") + "."
    )


def elements(plan: Plan) -> tuple[int, int]:
    """Numbers per token in the all-reduces of activations, of a forward and of a backward; cf. ``Plan.reductions``."""

    def other(path: str) -> int:
        """The width of a linear on the side that is whole."""
        layout = plan.layouts[f"{path}.weight"]
        return layout.shape[1 - layout.dim] if layout.dim is not None else layout.shape[0]

    forward = backward = width = 0
    widths: dict[str, int] = {}
    for path, block in plan.blocks.items():
        width = widths[path] = other(block.rows[-1]) if block.rows else width  # experts: as the blocks before them
        forward += width
        backward += width if block.inputs else sum(other(at) for at in (*block.input_of, *block.output_of))
    forward -= sum(widths[first] for first, _ in plan.parallel_residual.values())
    forward += sum(other(path) for path in plan.embeddings)
    backward += sum(other(path) for path in plan.heads)
    return forward, backward


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
