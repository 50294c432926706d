"""The docs' table of what is proven of each architecture."""

from __future__ import annotations

from pathlib import Path

from zoo import FEW_KEYS, ODD_HEADS, PLAIN, Case, cases, few_keys, layers, model_types, plan_of, reductions

from tp_plugin.cli.dropout import dropouts
from tp_plugin.cli.models import typical_share
from tp_plugin.policy import policy_for
from tp_plugin.policy.hf_plan import PROVEN

BEGIN, END = "<!-- zoo: written by ci/zoo.py -->", "<!-- /zoo -->"
HEADER = (
    "model types", "sharded", "all-reduces a layer", "tp", "kv heads < tp", "odd heads", "also",
    "`generate`", "dropout",
)  # fmt: skip


def rows() -> list[tuple[str, ...]]:
    """One row for each policy."""
    by_policy: dict[int, list[str]] = {}
    for model_type in model_types():
        by_policy.setdefault(id(policy_for(model_type)), []).append(model_type)
    table = [_row(types) for types in by_policy.values()]
    return [row for _, row in sorted(zip(by_policy.values(), table, strict=True))]


def _row(types: list[str]) -> tuple[str, ...]:
    shares, forward, backward, generates, drops = [], set(), set(), [], []
    for model_type in types:
        model, plan = plan_of(Case(model_type, PLAIN, 2, {}))
        shares.append(typical_share(model_type) or 0.0)
        for layer in layers(plan):
            up, down = reductions(model_type, plan, layer)
            forward.add(up)
            backward.add(down)
        generates.append(model.can_generate())  # type: ignore[operator]
        drops.append(any(dropouts(model.config)))
    known = [case for model_type in types for case in cases(model_type)]
    names = list(dict.fromkeys(case.name for case in known if case.name not in (PLAIN, FEW_KEYS, ODD_HEADS)))

    def ticked(done: list[bool]) -> str:
        return "✓" if all(done) else "partly" if any(done) else "–"

    few = [bool(few_keys(model_type)) for model_type in types]
    odd = [any(case.name == ODD_HEADS for case in cases(model_type)) for model_type in types]
    return (
        ", ".join(types), f"{min(shares):.1%}", f"{_span(forward)} + {_span(backward)}",
        ", ".join(str(tp) for tp in sorted({case.tp for case in known})), ticked(few), ticked(odd),
        "; ".join(names) or "–", ticked(generates), ticked(drops),
    )  # fmt: skip


def _span(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)}–{max(numbers)}"


def markdown(table: list[tuple[str, ...]]) -> str:
    """What stands in the docs between the markers."""
    lines = [HEADER, ("---",) * len(HEADER), *table]
    return "\n".join(
        [
            "",
            "<details>",
            "<summary>What is proven of each</summary>",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"By the plan that transformers has for them: {', '.join(sorted(PROVEN))}.",
            "",
            "</details>",
            "",
        ]
    )


PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "architectures.md"


def shown() -> str:
    """What the docs have between the markers."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def show(table: list[tuple[str, ...]]) -> None:
    """Write the rows into the docs."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the lines {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(table)}\n{END}{after}", encoding="utf-8")
