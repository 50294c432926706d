"""Prove every architecture and print the table: python ci/zoo.py [--write] [--log FILE] [PATTERN ...]

All cases of tests/zoo.py, dropouts, and the policies that come from transformers' plans: some 500 proofs, on groups
of local gloo ranks in ten to thirty minutes. A pattern is a model type or matches names of proofs, as in
``'llama-*-tp4'``. ``--log`` takes up a run that was cut off: what that file has as right is not run again, so it is
good for one state of the code. ``--write`` puts the table into the docs if everything is right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TEST_TIMEOUT", "400")  # it may run beside other work
os.environ["TP_PLUGIN_DISABLE"] = "1"


class Proof(NamedTuple):
    """``function(*args)`` runs on each of ``world`` ranks; ``faults`` says what is wrong with their results."""

    name: str
    model_type: str
    world: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    faults: Callable[[list[Any]], list[str]]

    def chosen(self, patterns: list[str]) -> bool:
        return not patterns or any(self.model_type == p or fnmatchcase(self.name, p) for p in patterns)


def proofs() -> Iterator[Proof]:
    """All of them, in the order of model types."""
    import test_hf_plan
    import zoo

    from tp_plugin.cli.dropout import dropouts

    for kind in zoo.model_types():
        for case in zoo.cases(kind):
            yield Proof(str(case), kind, case.tp, zoo.prove, (case,), zoo.faults)
        if any(dropouts(zoo.config_for(kind))):
            yield Proof(f"{kind}-dropout-tp2", kind, 2, zoo.prove_with_dropout, (kind, 2), zoo.dropout_faults)
    for kind in sorted(test_hf_plan.PROVEN):
        for tp in (2, 4):
            yield Proof(f"{kind}-imported-tp{tp}", kind, tp, test_hf_plan.imported, (kind, tp), zoo.faults)


def main() -> int:
    """Exit status: 0 if all is proven."""
    import zoo_table
    from workers import WorkerError, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only these model types or proofs")
    parser.add_argument("--log", type=Path, help="take results from, and append them to, this file (JSON lines)")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    arguments = parser.parse_args()
    if arguments.write and arguments.patterns:
        parser.error("--write wants all proofs")
    chosen = [proof for proof in proofs() if proof.chosen(arguments.patterns)]
    if not chosen:
        parser.error(f"no proof is named {', '.join(arguments.patterns)}")

    done: dict[str, list[str]] = {}
    if arguments.log and arguments.log.exists():
        done = dict(json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines())
    began, failed = time.monotonic(), 0
    for number, proof in enumerate(chosen, 1):
        if done.get(proof.name) == []:
            continue
        figures = ""
        try:
            results = run(proof.world, proof.function, *proof.args)
            faults = proof.faults(results)
            if hasattr(results[0], "gradient"):
                worst = (
                    f"{kind} {max(getattr(r, kind) for r in results):.0e}" for kind in ("loss", "gradient", "weight")
                )
                figures = f": {', '.join(worst)}"
        except WorkerError as error:
            faults = [str(error)]
        failed += bool(faults)
        print(f"{time.monotonic() - began:6.0f} s  {number}/{len(chosen)}  {proof.name}{figures}", file=sys.stderr)
        for fault in faults:
            print(f"FAILED: {proof.name}: {fault}", file=sys.stderr)
        if arguments.log:
            with arguments.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps([proof.name, faults]) + "\n")
    print(f"{len(chosen)} proofs, {failed} failures, {time.monotonic() - began:.0f} s", file=sys.stderr)
    if not arguments.patterns:
        table = zoo_table.rows()
        print(zoo_table.markdown(table))
        if arguments.write and not failed:
            zoo_table.show(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
