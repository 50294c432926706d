"""The wheel: built without network, installed elsewhere, it trains without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tp_plugin

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """\
import sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

accelerator = Accelerator()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
model = AutoModelForCausalLM.from_config(config)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
tokens = torch.arange(16)[None]
for _ in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
ours = sys.modules.get("tp_plugin.shard")
sys.stdout.write(f"TRAINED {loss.item():.5f} {accelerator.num_processes} {ours and ours.__file__}\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tp_plugin", "model_policies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=200)
    (built,) = out.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert f"\nVersion: {tp_plugin.__version__}\n" in metadata
    assert {"deepspeed", "peft", "trl", "docs", "all"} <= set(
        re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)
    )
    assert "[torch.backends]" in points and "[tp_plugin.policies]" in points and "tp-plugin = " in points
    packaged = {name for name in names if name.endswith(".py")}
    assert packaged == {
        str(path.relative_to(ROOT)) for room in ("tp_plugin", "model_policies") for path in (ROOT / room).rglob("*.py")
    }


def test_it_trains_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ["--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True, timeout=200)
    (tmp_path / "train.py").write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "ACCELERATE"))}
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}

    def trained(*words: str, **more: str) -> list[str]:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--main_process_port", "0"]
        settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        ended = subprocess.run(
            [*launcher, *settings, *words, "train.py"],
            cwd=tmp_path, env=env | more, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return [line for line in ended.stdout.splitlines() if line.startswith("TRAINED")]

    sharded = trained("--num_processes", "2", "--tp_size", "2")
    (plain,) = trained("--num_processes", "1", TP_PLUGIN_DISABLE="1")
    assert len(set(sharded)) == 1 and len(sharded) == 2
    _, loss, processes, home = sharded[0].split()
    assert processes == "1" and home.startswith(str(site))
    assert abs(float(loss) - float(plain.split()[1])) < 1e-4
