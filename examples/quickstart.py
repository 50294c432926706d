"""Fine-tune a small model twice, on one process and tensor-parallel, and show that the numbers are the same.

    bash ci/quickstart.sh                  # makes the environment first
    bash ci/quickstart.sh --engine zero2   # the same with DeepSpeed's ZeRO, at tp 2 x dp 2
    bash ci/quickstart.sh --pp 2           # two pipeline stages, at tp 2: four processes hold one model
    bash ci/quickstart.sh --real           # a real model and `trl sft` instead: examples/real_model.py
    python examples/quickstart.py          # in an environment that has the package

Ends with an error if the two runs differ by more than the limits below.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import curves
from rich.console import Console
from rich.table import Table
from rich.text import Text

EXAMPLES = Path(os.path.relpath(Path(__file__).resolve().parent))  # relative: the commands shown stay readable
BIN = Path(sys.executable).parent  # not resolved: an environment's python is a link to another one
PROMPT = "import os\nimport"
BLOCKS, ACCUMULATION = 8, 2  # blocks per micro-batch of all processes, and micro-batches per step
# Below the usual gradient norm, so that clipping is always at work.
MAX_GRAD_NORM = 0.5

# fp32 against fp32: only the order of additions differs.
MAX_LOSS_DIFFERENCE = 1e-5  # relative, every step
MAX_WEIGHT_DIFFERENCE = 3e-4  # absolute, after the last step
# The norm is the most sensitive number: with --arch gpt2 weights 5e-6 apart gave norms 1.8e-5 apart at step 25, which
# agree to 3e-7 when computed from the same weights. So the strict limit holds while the weights have not yet drifted.
MAX_EARLY_NORM_DIFFERENCE = 1e-5  # relative, first 6 steps
MAX_NORM_DIFFERENCE = 1e-4  # relative, every step

# A terminal when there is one; in a log, tables of a readable width.
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Run:
    """What one training run left behind."""

    folder: Path
    records: list[dict]
    seconds: float

    def series(self, key: str) -> dict[int, float]:
        return {record["step"]: record[key] for record in self.records if key in record}


@dataclass
class Engine:
    """How the two runs are launched."""

    config: Path
    dp: int = 1
    pp: int = 1
    options: tuple[object, ...] = ()  # of `accelerate launch`
    env: dict[str, str] = field(default_factory=dict)
    single: tuple[object, ...] = (EXAMPLES / "configs" / "single.yaml",)  # config and options of the reference
    program: tuple[object, ...] = (EXAMPLES / "finetune.py",)  # of the reference
    reference: str = "plain Accelerate"

    @property
    def column(self) -> str:
        more = [f"{name} {size}" for name, size in (("pp", self.pp), ("dp", self.dp)) if size > 1]
        return " x ".join(["tp 2", *more]) if more else "tp_size 2"

    @property
    def processes(self) -> int:
        return 2 * self.pp * self.dp


@dataclass
class Check:
    what: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # False for nan


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without settings that would change one of the runs."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TP_PLUGIN_", "ACCELERATE_"))}
    env["OMP_NUM_THREADS"] = "1"  # one thread per process in both runs
    env["TOKENIZERS_PARALLELISM"] = "false"
    if not sys.stderr.isatty():
        env["TQDM_MININTERVAL"] = "5"  # progress bars in a log: a line every five seconds is enough
    return env | extra


def run(*command: object, env: dict[str, str], capture: bool = False) -> str:
    """Run a program, stop here if it fails. Its progress goes straight to the terminal."""
    words = [str(word) for word in command]
    console.print(Text("$ " + shlex.join([Path(words[0]).name, *words[1:]]), "dim"))
    result = subprocess.run(words, env=env, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        raise SystemExit(f"quickstart failed: exit status {result.returncode} from the command above")
    return result.stdout or ""


def choose_engine(name: str, pp: int, work: Path) -> Engine:
    configs = EXAMPLES / "configs"
    if name == "ddp" and pp == 1:
        return Engine(configs / "tp2.yaml")
    if name == "ddp":
        options = ("--pp_size", pp, "--num_processes", 2 * pp)
        return Engine(configs / "tp2.yaml", pp=pp, options=options)
    config = work / f"{name}.yaml"
    yaml = (configs / "tp2_dp2_zero3.yaml").read_text(encoding="utf-8")
    config.write_text(yaml.replace("examples/configs/ds_zero3", str(configs / f"ds_{name}")), encoding="utf-8")
    options = ("--gradient_clipping", MAX_GRAD_NORM)
    return Engine(
        config,
        dp=2,
        options=options,
        env={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore::FutureWarning"},
        single=(config, *options, "--num_processes", 1),
        program=(EXAMPLES / "plain_deepspeed.py", EXAMPLES / "finetune.py"),
        reference="plain DeepSpeed",
    )


def train(
    launch: tuple[object, ...], dp: int, folder: Path, work: Path, args: argparse.Namespace, env: dict[str, str]
) -> Run:
    log_file = work / f"{folder.name}.jsonl"
    files = ["--model", work / "checkpoint", "--data", work / "corpus.txt", "--output", folder, "--log-file", log_file]
    settings = ["--max-steps", args.steps, "--eval-every", max(args.steps // 2, 1), "--batch-size", BLOCKS // dp]
    settings += ["--accum", ACCUMULATION, "--lr", 1e-3, "--max-grad-norm", MAX_GRAD_NORM]
    start = time.perf_counter()
    run(BIN / "accelerate", "launch", "--config_file", *launch, *files, *settings, env=env)
    seconds = time.perf_counter() - start
    return Run(folder, [json.loads(line) for line in log_file.read_text().splitlines()], seconds)


def read_reports(folder: Path) -> list[dict]:
    reports = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    if not reports:
        raise SystemExit(f"quickstart failed: no rank reported to {folder}; was the run tensor-parallel at all?")
    return sorted(reports, key=lambda report: report["rank"])


def relative_difference(ours: dict[int, float], reference: dict[int, float]) -> float:
    # max() can lose a nan, and two equal nans are no agreement.
    if ours.keys() != reference.keys() or not all(map(math.isfinite, [*ours.values(), *reference.values()])):
        return math.inf
    return max(abs(ours[step] - reference[step]) / max(abs(reference[step]), 1e-12) for step in reference)


def compare(tp: Run, single: Run, weight_difference: float) -> list[Check]:
    def differs(key: str, first: int | None = None) -> float:
        return relative_difference(*(dict(list(run.series(key).items())[:first]) for run in (tp, single)))

    return [
        Check("training loss, relative, worst step", differs("loss"), MAX_LOSS_DIFFERENCE),
        Check("evaluation loss, relative", differs("eval_loss"), MAX_LOSS_DIFFERENCE),
        Check("gradient norm, relative, first 6 steps", differs("grad_norm", first=6), MAX_EARLY_NORM_DIFFERENCE),
        Check("gradient norm, relative, worst step", differs("grad_norm"), MAX_NORM_DIFFERENCE),
        Check("learning rate", differs("lr"), 0.0),
        Check("number of evaluated blocks", differs("eval_blocks"), 0.0),
        Check("saved weights, absolute, worst element", weight_difference, MAX_WEIGHT_DIFFERENCE),
    ]


def curve_table(tp: Run, single: Run, column: str, rows: int = 12) -> Table:
    table = Table(title=f"The same script, one process and {column}", title_justify="left")
    table.add_column("step", justify="right")
    for quantity in ("loss", "grad norm"):
        for head in (f"{quantity}, 1 process", column, "|difference|"):
            table.add_column(head, justify="right")
    single_loss, tp_loss = single.series("loss"), tp.series("loss")
    single_norm, tp_norm = single.series("grad_norm"), tp.series("grad_norm")
    steps = sorted(single_loss.keys() & tp_loss.keys())
    shown = set(steps[:: max(len(steps) // rows, 1)]) | set(steps[-1:])
    for step in sorted(shown):
        row = [str(step)]
        for reference, ours in ((single_loss, tp_loss), (single_norm, tp_norm)):
            row += [
                f"{reference[step]:.6f}",
                f"{ours[step]:.6f}",
                f"{abs(reference[step] - ours[step]):.1e}",
            ]
        table.add_row(*row)
    table.add_section()
    single_eval, tp_eval = single.series("eval_loss"), tp.series("eval_loss")
    for step in sorted(single_eval.keys() & tp_eval.keys()):
        difference = f"{abs(single_eval[step] - tp_eval[step]):.1e}"
        table.add_row(f"eval {step}", f"{single_eval[step]:.6f}", f"{tp_eval[step]:.6f}", difference)
    return table


def memory_table(reports: list[dict], engine: str) -> Table:
    table = Table(title="Bytes of parameters per rank", title_justify="left", caption_justify="left")
    if engine == "zero3":
        table.caption = "in use; between uses ZeRO 3 keeps 1 / dp of them"
    places = {"rank": "rank", "tp rank": "tp_rank", "stage": "pp_rank", "dp rank": "dp_rank"}
    if reports[0]["pp_size"] == 1:
        del places["stage"]
    for column in (*places, "bytes", "of the whole model"):
        table.add_column(column, justify="right")
    for report in reports:
        held, whole = report["parameter_bytes"], report["whole_parameter_bytes"]
        ranks = (str(report[key]) for key in places.values())
        table.add_row(*ranks, f"{held:,}", f"{held / whole:.1%}")
    return table


def collectives_table(report: dict, steps: int) -> Table:
    title = f"Collectives per step of training ({ACCUMULATION} micro-batches)"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = f"of one rank, in the mean over {steps} steps; bytes that it puts in"
    table.add_column("operation / group")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right")
    for name, total in sorted(report["training_collectives"].items()):
        table.add_row(name, f"{total['count'] / steps:,.2f}", f"{total['bytes'] / steps:,.0f}")
    return table


def check_table(checks: list[Check]) -> Table:
    table = Table(title="Agreement", title_justify="left")
    for column, justify in (("quantity", "left"), ("difference", "right"), ("limit", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[red]DIFFERS[/]"
        limit = f"{check.limit:.0e}" if check.limit else "equal"
        table.add_row(check.what, f"{check.difference:.1e}", limit, verdict)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--engine", choices=["ddp", "zero0", "zero1", "zero2", "zero3"], default="ddp")
    parser.add_argument("--pp", type=int, choices=[1, 2], default=1, help="pipeline stages")
    parser.add_argument("--steps", type=int, help="default 30, with ZeRO (four processes) 20")
    parser.add_argument("--work", type=Path, default=Path("out/quickstart"), help="replaced if it exists")
    args = parser.parse_args()
    if args.pp > 1 and args.engine != "ddp":
        parser.error("--pp 2 goes with --engine ddp here: four processes")
    args.steps = args.steps or (30 if args.engine == "ddp" and args.pp == 1 else 20)

    start = time.perf_counter()
    work = args.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    engine = choose_engine(args.engine, args.pp, work)
    # The reference never meets the plugin, nor does the process that reloads the result.
    plain = environment(TP_PLUGIN_DISABLE="1")

    console.rule("[bold]1/4  A small checkpoint, a tokenizer and a text")
    make = ["--output", work / "checkpoint", "--text", work / "corpus.txt", "--arch", args.arch]
    run(sys.executable, EXAMPLES / "make_checkpoint.py", *make, env=plain | engine.env)

    console.rule(f"[bold]2/4  examples/finetune.py on one process: {engine.reference}")
    single = train((*engine.single, *engine.program), 1, work / "single", work, args, plain | engine.env)

    console.rule(f"[bold]3/4  examples/finetune.py with {engine.column}, {args.engine}")
    reporting = environment(TP_PLUGIN_REPORT=str(work / "report"))
    (work / "report").mkdir()
    launch = (engine.config, *engine.options, EXAMPLES / "finetune.py")
    tp = train(launch, engine.dp, work / "tp2", work, args, reporting | engine.env)
    reports = read_reports(work / "report")

    console.rule("[bold]4/4  The saved checkpoint, in plain transformers")
    check = [EXAMPLES / "check_checkpoint.py", tp.folder, "--reference", single.folder, "--prompt", PROMPT]
    reloaded = json.loads(run(sys.executable, *check, env=plain | engine.env, capture=True).splitlines()[-1])
    for text, style in ((PROMPT, "bold"), (reloaded["continuation"], "cyan")):
        console.print(Text(text, style), end="")
    console.print("\n")

    checks = compare(tp, single, reloaded["weight_difference"])
    for table in (
        curve_table(tp, single, engine.column),
        memory_table(reports, args.engine),
        collectives_table(reports[0], args.steps),
        check_table(checks),
    ):
        console.print(table)
    series = {"loss": "loss", "gradient norm": "grad_norm"}
    runs = {"1 process": single, engine.column: tp}
    drawn = {name: {quantity: run.series(key) for quantity, key in series.items()} for name, run in runs.items()}
    if curves.draw(drawn, work / "curves.png"):
        console.print(f"Curves: {work / 'curves.png'}")
    else:
        console.print("No curves are drawn: matplotlib is not installed (pip install matplotlib).")
    console.print(
        f"Training took {single.seconds:.0f} s on one process, {tp.seconds:.0f} s on {engine.processes}; "
        f"everything {time.perf_counter() - start:.0f} s. Files: {work}"
    )
    failed = [check.what for check in checks if not check.passed]
    if failed:
        raise SystemExit(f"quickstart FAILED: {engine.column} differs from one process in: {'; '.join(failed)}")
    console.print(f"[green]{engine.column}, {args.engine}: the numbers of one process ({engine.reference}).[/]")


if __name__ == "__main__":
    main()
