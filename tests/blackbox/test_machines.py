"""Two machines, launched as a user does: a TP group inside each, or one over both, about which the user is warned."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from . import hosts
from .compare import LOSS, NORM, checkpoints_equal, close, same
from .harness import BIN, SCRIPTS, Layout, Run

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PORT = "29577"  # nobody else's, in namespaces of their own


def launch(
    tmp_path: Path,
    checkpoints: dict[str, Path],
    launcher: str,
    layout: Layout,
    config: str = "tp2_two_machines.yaml",
) -> Run:
    """``loop.py`` on two hosts, with half of the processes each."""
    unlike = ("ACCELERATE_", "TP_PLUGIN_", "PARALLELISM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(unlike)} | {"OMP_NUM_THREADS": "1"}
    program = [str(SCRIPTS / "loop.py"), "--out", str(tmp_path), "--models", str(checkpoints["llama"].parent)]
    commands, local = [], str(layout.tp * layout.dp // 2)
    for number in ("0", "1"):
        if launcher == "accelerate":
            command = [str(BIN / "accelerate"), "launch", "--config_file", str(CONFIGS / config)]
            command += ["--main_process_ip", f"{hosts.NETWORK}.1", "--machine_rank", number]
        else:
            env |= {"TP_PLUGIN_TP_SIZE": str(layout.tp), "ACCELERATE_USE_CPU": "true"}
            command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", local, "--node_rank", number]
            command += ["--master_addr", f"{hosts.NETWORK}.1", "--master_port", PORT]
        commands.append([*command, *program])
    run = hosts.launch(commands, env, tmp_path, layout)
    assert run.code == 0, run.tail()
    return run


def agrees(run: Run, plain: Run) -> None:
    """The numbers of ``loop.py``, what it saved, and what a script sees of the machines."""
    same(run.report, plain.report, ["num_processes", "batches", "updates", "training_tokens"], str(run.layout))
    for at, (got, want) in enumerate(zip(run.report["steps"], plain.report["steps"], strict=True)):
        same(got, want, ["ids", "lr", "tokens"], f"step {at}")
        close(got["losses"], want["losses"], LOSS, f"losses of step {at}")
        close(got["norm"], want["norm"], NORM, f"norm of step {at}")
    for got, want in zip(run.report["evaluations"], plain.report["evaluations"], strict=True):
        same(got, want, ["ids", "tokens", "count"], "evaluation")
        close(got["losses"], want["losses"], LOSS, "evaluation")
    for folder in ("pretrained", "save_model"):
        checkpoints_equal(run.out / folder, plain.out / folder)
    assert [own["is_main"] for own in run.ranks] == [True] + [False] * (len(run.ranks) - 1)
    assert [own["is_local_main"] for own in run.ranks] == [True, *[False] * (len(run.ranks) // 2 - 1)] * 2
    assert [own["process_index"] for own in run.ranks] == [n // run.layout.tp for n in range(len(run.ranks))]


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.full)])
def test_a_model_inside_each_machine(launcher, bench, checkpoints, tmp_path):
    run = launch(tmp_path, checkpoints, launcher, Layout(2, 2))
    agrees(run, bench.run("loop", 1, 2, ("--models", str(checkpoints["llama"].parent), "--model", "llama")))
    assert "spans machines" not in run.output


def test_a_stage_on_each_machine(bench, checkpoints, tmp_path):
    """The TP groups stay inside, so nothing is warned of."""
    run = launch(tmp_path, checkpoints, "accelerate", Layout(4, 1), "tp2_pp2_two_machines.yaml")
    agrees(run, bench.run("loop", 1, 1, ("--models", str(checkpoints["llama"].parent), "--model", "llama")))
    assert "spans machines" not in run.output and "tp 2 × pp 2" in run.output


def test_a_model_over_both_machines_is_warned_about(bench, checkpoints, tmp_path):
    run = launch(tmp_path, checkpoints, "torchrun", Layout(2, 1))
    agrees(run, bench.run("loop", 1, 1, ("--models", str(checkpoints["llama"].parent), "--model", "llama")))
    (warning,) = re.findall(r"tp_plugin: warning: a TP group spans machines .*", run.output)
    assert "ranks [0] on " in warning and "ranks [1] on " in warning
    # two blocks a layer, the embedding and the head; each all-reduce 48 floats a token
    assert "5 times in the forward and 5 times in the backward" in warning
    assert f"take {10 * 48 * 4:,} bytes a token" in warning
    assert "let tp_size divide the number of processes on a machine" in warning
