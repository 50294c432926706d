"""How far 8-bit optimizer states over a TP group are from those of one process, beside how far 8 bits are from 32.

    python ci/bench/eight_bit.py [--steps 40] [--tp 2]

Trains one Llama (fp32, clipped, 40 steps) with bitsandbytes' AdamW and Lion in 8 and in 32 bits, on one process and on
``tp``, and compares the weights at the end. Writes ``results/eight_bit.md`` and ``.json``. "aligned": each rank's part
is made of whole blocks of 256 elements; "across": columns are cut inside of blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHAPES = {"aligned": 1024, "across": 1000}
"""Widths of the MLP. Its output's columns are cut, at half of them."""
OPTIMIZERS = {"AdamW": ("AdamW8bit", "AdamW32bit"), "Lion": ("Lion8bit", "Lion32bit")}


def train(folder: Path, steps: int) -> None:
    """One launch: every shape and optimizer; the main process writes losses and weights."""
    import bitsandbytes
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    accelerator = Accelerator()
    for shape, width in SHAPES.items():
        for name in (name for pair in OPTIMIZERS.values() for name in pair):
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=128, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=512,
                )
            )  # fmt: skip
            rate = 1e-3 if name.startswith("Adam") else 1e-4
            optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=rate, weight_decay=0.1)
            model, optimizer = accelerator.prepare(model, optimizer)
            generator = torch.Generator().manual_seed(1)
            losses = []
            for _ in range(steps):
                starts = torch.randint(0, 512, (4, 1), generator=generator)
                ids = (starts + torch.arange(48) * (1 + starts % 7)) % 512  # progressions, which can be learned
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            weights = {key: value.clone() for key, value in accelerator.get_state_dict(model).items()}
            if accelerator.is_main_process:
                torch.save({"losses": losses, "weights": weights}, folder / f"{shape}-{name}.pt")
            accelerator.free_memory()


def launch(folder: Path, tp: int, steps: int) -> None:
    """Run :func:`train` on ``tp`` processes."""
    folder.mkdir()
    config = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_processes": tp, "num_machines": 1,
              "machine_rank": 0, "mixed_precision": "no", "main_process_port": 0,
              "distributed_type": "MULTI_CPU" if tp > 1 else "NO"}  # fmt: skip
    if tp > 1:
        config["tp_size"] = tp
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(folder / "config.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if tp > 1 else {"TP_PLUGIN_DISABLE": "1"})
    given = ["--into", str(folder), "--steps", str(steps)]
    subprocess.run([*command, str(Path(__file__).resolve()), *given], check=True, env=environment)


def distance(a: dict, b: dict) -> float:
    """Euclidean, over all weights."""
    return float(sum((a[name].double() - value.double()).square().sum() for name, value in b.items()) ** 0.5)


def main() -> None:
    """Launch one process and ``tp``, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.into is not None:
        train(given.into, given.steps)
        return
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as root:
        for tp in (1, given.tp):
            launch(Path(root) / str(tp), tp, given.steps)
        for shape in SHAPES:
            for kind, names in OPTIMIZERS.items():
                eight, full = ([torch.load(Path(root) / str(tp) / f"{shape}-{name}.pt") for tp in (1, given.tp)]
                               for name in names)  # fmt: skip
                rows.append({
                    "blocks": shape, "optimizer": kind,
                    "8 bits, tp to one process": distance(eight[1]["weights"], eight[0]["weights"]),
                    "32 bits, tp to one process": distance(full[1]["weights"], full[0]["weights"]),
                    "one process, 8 bits to 32": distance(eight[0]["weights"], full[0]["weights"]),
                    "tp, 8 bits to 32": distance(eight[1]["weights"], full[0]["weights"]),
                    "last loss": [eight[0]["losses"][-1], eight[1]["losses"][-1], full[0]["losses"][-1]],
                })  # fmt: skip
    columns = list(rows[0])
    lines = [
        "# 8-bit optimizer states over a TP group", "",
        f"Llama, width 128, two layers, {given.steps} clipped steps in fp32, tp {given.tp}; Euclidean distances of all "
        "weights at the end. Last loss: 8 bits on one process, 8 bits at tp, 32 bits on one process.", "",
        f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}",
    ]  # fmt: skip
    for row in rows:
        values = [", ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else
                  f"{value:.2e}" if isinstance(value, float) else value for value in row.values()]  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "eight_bit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / "eight_bit.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
