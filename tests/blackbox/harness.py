"""Launch an ordinary Accelerate script the way a user does, and read what it wrote.

Nothing here imports the plugin: the only things a run knows of tensor parallelism are the keys in its config file
(or command line, or environment). `TP_PLUGIN_DISABLE=1` makes a plain run an oracle that the plugin cannot touch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import preloaded
import yaml

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent
PLAIN_FSDP2 = Path(__file__).parents[2] / "examples" / "plain_fsdp2.py"


@dataclass(frozen=True)
class Layout:
    tp: int
    dp: int

    def __str__(self) -> str:
        return f"tp{self.tp}dp{self.dp}"

    @property
    def plain(self) -> Layout:
        """The run this one has to agree with: the same number of processes, each one device wide."""
        return Layout(1, self.dp)

    def groups(self) -> list[list[int]]:
        """Global ranks of each TP group; the index in the outer list is the process the script sees."""
        return [list(range(d * self.tp, (d + 1) * self.tp)) for d in range(self.dp)]


@dataclass
class Run:
    out: Path
    layout: Layout
    code: int
    output: str
    seconds: float
    _json: dict[str, object] = field(default_factory=dict)

    def _read(self, name: str):
        if name not in self._json:
            path = self.out / name
            assert path.exists(), f"{path} was never written.\n{self.tail()}"
            self._json[name] = json.loads(path.read_text())
        return self._json[name]

    @property
    def report(self):
        """What the script's main process wrote."""
        return self._read("report.json")

    @property
    def ranks(self) -> list:
        """What each rank wrote, by global rank."""
        return [self._read(f"rank{r}.json") for r in range(self.layout.tp * self.layout.dp)]

    def tail(self, lines: int = 80) -> str:
        return f"--- exit code {self.code} after {self.seconds:.0f} s; the output's end:\n" + "\n".join(
            self.output.splitlines()[-lines:]
        )

    def of(self, script: str) -> Run:
        """One script's part of a chained run."""
        part = self.out / script
        errors = sorted(part.glob("error.rank*.txt"))
        assert not errors, f"{script} at {self.layout} failed:\n" + "\n".join(e.read_text() for e in errors)
        assert part.is_dir(), f"{script} at {self.layout} was not reached.\n{self.tail()}"
        return Run(part, self.layout, self.code, self.output, self.seconds)


class Bench:
    """Runs scripts, each distinct launch once per session: comparing costs nothing, launching costs seconds."""

    def __init__(self, root: Path):
        self.root = root
        self.runs: dict[tuple, Run] = {}

    def run(self, scripts: str | list[str], tp: int = 1, dp: int = 1, args: tuple[str, ...] = (), **options) -> Run:
        """Like `launch`, but demands success: a failing run fails every test that reads it, with its output."""
        run = self.launch(scripts, tp, dp, args, **options)
        if isinstance(scripts, str):  # a chain's parts fail one by one, in Run.of
            assert run.code == 0, f"{scripts} at {run.layout} failed\n{run.tail()}"
        return run

    def launch(
        self,
        scripts: str | list[str],
        tp: int = 1,
        dp: int = 1,
        args: tuple[str, ...] = (),
        entry: str = "yaml",
        config: dict | None = None,
        timeout: float = 200,
        real: bool = False,
    ) -> Run:
        """Start it, unless it was started before. Processes are forked with their imports done, unless ``real``."""
        names = [scripts] if isinstance(scripts, str) else list(scripts)
        key = (tuple(names), tp, dp, tuple(args), entry, real, json.dumps(config, sort_keys=True))
        if key not in self.runs:
            program, flag = [str(SCRIPTS / f"{names[0]}.py")], "--out"
            if not isinstance(scripts, str):
                program = [str(SCRIPTS / "chain.py"), "--scripts", ",".join(names)]
            make = MAKERS.get(entry.split()[0], _command)
            if make in (_trl_command, _factory_command):  # whose scripts are their own
                program, entry, flag = [], f"{entry} {names[0]}", "--output_dir"
            for attempt in ("", "-again"):
                out = self.root / f"{len(self.runs):02d}-{'+'.join(names)}-tp{tp}dp{dp}{attempt}"
                out.mkdir(parents=True)
                command, env = make(out, tp, dp, entry, config or {})
                if not real and Path(command[0]).name in FORKED and preloaded.available():
                    command = [preloaded.python(), *command]
                whole = [*command, *program, flag, str(out), *args]
                self.runs[key] = _execute(whole, env, out, Layout(tp, dp), timeout)
                if tp > 1 or self.runs[key].code == 0 or GLOO_ABORT not in self.runs[key].output:
                    break
        run = self.runs[key]
        assert run.code != TIMED_OUT, f"{names} at {run.layout} did not end within {timeout} s\n{run.tail()}"
        return run


TIMED_OUT = -1000

FORKED = ("accelerate", "torchrun", "trl")
"""Launchers that start their ranks by ``sys.executable``."""

GLOO_ABORT = "terminate called without an active exception"
"""Of some exits of plain torch, without us: gloo's worker thread asks an interpreter that has ended for its lock.

A plain run that ends so is run again; ours must not end so (parallel/sync_points.py).
"""


def _command(out: Path, tp: int, dp: int, entry: str, extra: dict) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of one launch; `entry` is the door by which tp_size comes in.

    By "stages2" the `tp` ranks of a unit are two pipeline stages of half as many TP ranks.
    """
    world = tp * dp
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TP_PLUGIN_", "PARALLELISM_"))}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
    config: dict = {
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "num_processes": world,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
        "main_process_port": 0,  # torchrun picks a free one
    }
    options: list[str] = []
    if tp == 1:
        # Accelerate 1.15's own MULTI_CPU starts one process only, so the plain oracle for dp=2 goes by MULTI_GPU.
        config["distributed_type"] = "NO" if dp == 1 else "MULTI_GPU"
        env |= {"TP_PLUGIN_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    elif entry == "torchrun":
        env |= {"TP_PLUGIN_TP_SIZE": str(tp), "ACCELERATE_USE_CPU": "true"}
        return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(world)], env
    elif entry == "command line":
        config["distributed_type"] = "MULTI_CPU"
        options = ["--tp_size", str(tp)]
    elif entry.startswith("stages"):
        stages = int(entry.removeprefix("stages"))
        config |= {"distributed_type": "MULTI_CPU", "tp_size": tp // stages, "pp_size": stages}
    else:
        config |= {"distributed_type": "MULTI_GPU" if entry == "yaml multi_gpu" else "MULTI_CPU", "tp_size": tp}
    path = out / "config.yaml"
    config |= extra
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return [str(BIN / "accelerate"), "launch", "--config_file", str(path), *options], env


def _zero_command(out: Path, tp: int, dp: int, entry: str, extra: dict) -> tuple[list[str], dict[str, str]]:
    """The same for DeepSpeed; tp_size comes in by `extra`, or by a JSON that the script is given."""
    world = tp * dp
    _, env = _command(out, 1, 1, "", {})
    del env["ACCELERATE_USE_CPU"], env["TP_PLUGIN_DISABLE"]
    env["TORCH_EXTENSIONS_DIR"] = str(out / "compiled")
    if entry == "zero plain":
        env |= {"TP_PLUGIN_DISABLE": "1", "BLACKBOX_PLAIN": "1"}
    elif entry == "zero deepspeed":
        env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
        return [str(BIN / "deepspeed"), "--num_gpus", str(world), "--master_port", str(_free_port())], env
    elif entry == "zero accelerate":
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": world}
        config |= {"num_machines": 1, "machine_rank": 0, "main_process_port": 0, "use_cpu": False} | extra
        (out / "config.yaml").write_text(yaml.safe_dump(config))
        return [str(BIN / "accelerate"), "launch", "--config_file", str(out / "config.yaml")], env
    return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(world)], env


def _fsdp2_command(out: Path, tp: int, dp: int, entry: str, extra: dict) -> tuple[list[str], dict[str, str]]:
    """The same for FSDP2 by Accelerate's config; `extra` is its fsdp_config. Plain, it needs help to run on CPU."""
    _, env = _command(out, tp, dp, [*entry.split(), "yaml"][1], {})
    env.pop("ACCELERATE_USE_CPU", None)
    config = yaml.safe_load((out / "config.yaml").read_text())
    wrapping = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
    }
    config |= {"distributed_type": "FSDP", "use_cpu": tp > 1, "fsdp_config": wrapping | extra}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    helper = [str(PLAIN_FSDP2)] if tp == 1 else []
    return [str(BIN / "accelerate"), "launch", "--config_file", str(out / "config.yaml"), *helper], env


def _trl_command(out: Path, tp: int, dp: int, entry: str, extra: dict) -> tuple[list[str], dict[str, str]]:
    """The same by TRL's command line, which starts `accelerate launch`; `entry` is "trl" and the name of its script."""
    _, env = _command(out, tp, dp, "yaml", extra)
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *filter(None, [env.get("PYTHONPATH")])])  # for its rewards
    return [str(BIN / "trl"), entry.split()[1], "--accelerate_config", str(out / "config.yaml")], env


def _factory_command(out: Path, tp: int, dp: int, entry: str, extra: dict) -> tuple[list[str], dict[str, str]]:
    """The same by LLaMA-Factory's or ms-swift's command line, which starts torchrun if it is told to."""
    _, env = _command(out, tp, dp, "torchrun", extra)
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}"} | extra
    if tp * dp > 1:
        env |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(tp * dp), "MASTER_PORT": str(_free_port())}
    return [str(BIN / word) if at == 0 else word for at, word in enumerate(entry.split()[1:])], env


MAKERS = {"zero": _zero_command, "fsdp2": _fsdp2_command, "trl": _trl_command, "factory": _factory_command}
"""By the first word of an entry; `_command` for the others."""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _execute(command: list[str], env: dict[str, str], out: Path, layout: Layout, timeout: float) -> Run:
    token = uuid.uuid4().hex
    log = out / "output.log"
    started = time.monotonic()
    code = TIMED_OUT
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=env | {"BLACKBOX_RUN": token}, cwd=out, stdout=sink, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(token, code == TIMED_OUT)
            process.wait()
    return Run(out, layout, code, log.read_text(errors="replace"), time.monotonic() - started)


def stop(token: str, hangs: bool) -> None:
    """End what is left of a launch; if it hangs, Python's faulthandler first writes where each process is."""
    if hangs:
        _signal_all(token, signal.SIGABRT)
        time.sleep(1)
    _signal_all(token, signal.SIGKILL)


def _signal_all(token: str, number: int) -> None:
    """Signal what is left of this launch and nothing else.

    torchrun gives each worker a session of its own, so the launcher's process group does not hold them; the token in
    their environment does.
    """
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"BLACKBOX_RUN={token}".encode() in (path / "environ").read_bytes():
                os.kill(int(path.name), number)
        except (OSError, ProcessLookupError):
            continue  # not ours to read, or gone meanwhile
