"""The key: where it is found, what it makes legal, what is refused, and what an idle process pays for the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tp_plugin.config.resolve import current_config
from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.launch import autoload

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter (output captured), with the plugin's variables only as given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "TORCH_DEVICE"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )


def launch(tmp_path: Path, config: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with ``config`` of a script that says what it sees."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom accelerate import Accelerator\na = Accelerator()\n"
        "size, options = (os.environ.get('TP_PLUGIN_' + name) for name in ('TP_SIZE', 'OPTIONS'))\n"
        "sys.stdout.write(f'SEES {size} {options} {a.num_processes} {a.is_main_process}\\n')\n"  # one write a rank
    )
    (tmp_path / "config.yaml").write_text(config)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "TORCH_DEVICE"))}
    return subprocess.run(
        [*command, "--config_file", str(tmp_path / "config.yaml"), *arguments, str(script)],
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def seen(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("SEES"))


# --- without the key ------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_imported_or_patched() -> None:
    result = python(
        "import sys, torch, torch.nn.utils, accelerate, json\n"
        "print(json.dumps([sorted(m for m in sys.modules if m.startswith(('tp_plugin', 'model_policies'))),"
        "torch.nn.utils.get_total_norm.__module__, accelerate.Accelerator.prepare.__module__,"
        "accelerate.PartialState.__init__.__module__, accelerate.utils.operations.torch is torch]))"
    )
    modules, *owners = json.loads(result.stdout)
    light = ["", ".launch", ".launch.autoload", ".launch.deepspeed_config", ".launch.imports"]
    assert modules == [f"tp_plugin{name}" for name in light], result.stderr
    assert owners == ["torch.nn.utils.clip_grad", "accelerate.accelerator", "accelerate.state", True]


def test_the_hook_needs_next_to_nothing() -> None:
    """What it costs ``import torch`` is what it imports (ci/bench/idle.py takes the time)."""
    result = python(
        "import sys, os, importlib.metadata\n"  # torch imports these itself
        "before = set(sys.modules)\nimport tp_plugin.launch.autoload as hook\nhook.activate()\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    assert result.stdout.split() == ["_json", "json", "tp_plugin"], "it imports more than it did"


@pytest.mark.parametrize(
    "environment", [{"TP_PLUGIN_TP_SIZE": "1"}, {"TP_PLUGIN_TP_SIZE": "2", "TP_PLUGIN_DISABLE": "1"}]
)
def test_off_is_off(environment: dict[str, str]) -> None:
    result = python("import sys, torch; print('tp_plugin.launch.worker' in sys.modules)", **environment)
    assert result.stdout.strip() == "False", result.stderr


def test_a_bad_value_does_not_break_import_torch() -> None:
    result = python(
        "import torch; print('fine')\nfrom accelerate import PartialState\nPartialState()", TP_PLUGIN_TP_SIZE="two"
    )
    assert result.stdout.strip() == "fine"
    assert "tp_size: expected a whole number >= 1, found 'two'" in result.stderr


@pytest.mark.parametrize(
    "first", ["accelerate", "accelerate.utils", "transformers.modeling_utils", "transformers", "torch"]
)
def test_every_library_is_patched_whichever_is_imported_first(first: str) -> None:
    """``import torch`` runs the hook in the middle of ``import accelerate`` when a script starts with the latter."""
    result = python(
        f"import {first}\nimport accelerate, transformers.modeling_utils, torch.nn.utils\n"
        "from accelerate.data_loader import DataLoaderShard\nfrom accelerate import utils\n"
        "for f in (accelerate.Accelerator.prepare, accelerate.PartialState.__init__, DataLoaderShard.__iter__,"
        " utils.broadcast, utils.broadcast_object_list, transformers.PreTrainedModel.__init__,"
        " transformers.PreTrainedModel.save_pretrained):\n"
        "    assert f.__wrapped__, f\n"
        "assert torch.nn.utils.get_total_norm.sees_whole_model\n"
        "from tp_plugin.engines.patching import unpatch_all\nunpatch_all()\n"
        "assert not hasattr(accelerate.Accelerator.prepare, '__wrapped__')\n"
        "assert accelerate.utils.operations.torch is torch\nprint('all')",
        TP_PLUGIN_TP_SIZE="2",
    )
    assert result.stdout.strip().endswith("all"), result.stderr


# --- accelerate launch ----------------------------------------------------------------------------------------------


def test_key_in_the_file(tmp_path: Path) -> None:
    lines = seen(launch(tmp_path, CONFIG + "tp_size: 2\ntp_plugin:\n  audit_every: 3\n"))
    assert lines == ['SEES 2 {"audit_every": 3} 1 False', 'SEES 2 {"audit_every": 3} 1 True']


@pytest.mark.parametrize("flag", [["--tp_size", "2"], ["--tp-size=2"]])
def test_key_on_the_command_line(tmp_path: Path, flag: list[str]) -> None:
    assert len(seen(launch(tmp_path, CONFIG, *flag))) == 2


def test_multi_gpu_with_use_cpu_counts_its_processes(tmp_path: Path) -> None:
    config = CONFIG.replace("MULTI_CPU", "MULTI_GPU").replace("num_processes: 2", "num_processes: 4") + "tp_size: 2\n"
    lines = seen(launch(tmp_path, config))
    assert lines == ["SEES 2 {} 2 False"] * 3 + ["SEES 2 {} 2 True"]


def test_disabled_the_key_is_legal_and_does_nothing(tmp_path: Path) -> None:
    config = CONFIG.replace("num_processes: 2", "num_processes: 1") + "tp_size: 2\n"
    result = launch(tmp_path, config, TP_PLUGIN_DISABLE="1")
    assert seen(result) == ["SEES None None 1 True"]


def test_without_the_plugin_accelerate_would_refuse_the_key(tmp_path: Path) -> None:
    result = launch(tmp_path, CONFIG + "tp_size: 2\n", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "unknown keys (['tp_size'])" in result.stderr, "Accelerate changed: is tp_size its own key now?"


REFUSED = {
    "another world": ("tp_size: 3\n", "tp_size: 3 does not divide num_processes: 2"),
    "a word": ("tp_size: two\n", "tp_size: expected a whole number >= 1, found 'two'"),
    "unknown key": ("tp_size: 2\ntp_plugin: {audit: 3}\n", "tp_plugin: unknown key 'audit'; the known keys are policy"),
    "no mapping": ("tp_size: 2\ntp_plugin: 7\n", "tp_plugin: expected a mapping"),
    "nested": ("parallelism_config:\n  tp_size: 2\n", "`parallelism_config.tp_size: 2` has no effect there"),
    "both": (
        "tp_size: 2\nparallelism_config:\n  parallelism_config_tp_size: 2\n",
        "keep the top-level `tp_size` and remove the other",
    ),
    "FSDP": ("tp_size: 2\nfsdp_config: {fsdp_version: 1}\n", "write fsdp_version: 2 in fsdp_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(tmp_path: Path, case: str) -> None:
    keys, message = REFUSED[case]
    result = launch(tmp_path, (CONFIG.replace("MULTI_CPU", "FSDP") if case == "FSDP" else CONFIG) + keys)
    assert result.returncode == 1
    assert "tp_plugin: " in result.stderr and message in result.stderr and "Traceback" not in result.stderr, (
        result.stderr
    )
    assert "SEES" not in result.stdout


def test_one_process_is_refused_when_the_state_is_made() -> None:
    result = python("from accelerate import Accelerator; Accelerator()", TP_PLUGIN_TP_SIZE="2")
    assert "tp_size=2 needs 2 processes or a multiple, but this is one process" in result.stderr


# --- options --------------------------------------------------------------------------------------------------------


def test_options_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunConfig.parse("4", {"policy": "a:B", "audit_every": 5, "leave_whole": ["bert"]})
    for key, value in options.to_environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TP_PLUGIN_DISABLE", raising=False)
    assert current_config() == options == RunConfig(4, "a:B", 5, ("bert",))


@pytest.mark.parametrize("bad", [0, -1, "x", None, True, 1.5])
def test_bad_sizes(bad: Any) -> None:
    with pytest.raises(TPError, match="tp_size: expected a whole number"):
        RunConfig.parse(bad)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"audit_every": -1}, r"tp_plugin\.audit_every: expected a whole number >= 0"),
        ({"policy": 3}, r"tp_plugin\.policy: expected `module:NAME`"),
        ({"leave_whole": "bert"}, r"tp_plugin\.leave_whole: expected a list"),
    ],
)
def test_bad_options(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(TPError, match=message):
        RunConfig.parse(2, mapping)


@pytest.mark.parametrize(
    ("argv", "is_launcher"),
    [
        (["/usr/bin/accelerate", "launch", "x.py"], True),
        (["/usr/bin/accelerate-launch", "x.py"], True),
        (["-m", "launch"], True),
        (["/site-packages/accelerate/commands/launch.py"], True),
        (["/usr/bin/accelerate", "config"], False),
        (["train.py", "launch"], False),
        (["/home/me/launch.py"], False),
        ([], False),
    ],
)
def test_launchers_are_known(argv: list[str], is_launcher: bool) -> None:
    assert autoload._is_accelerate_launch(argv) is is_launcher


@pytest.mark.parametrize("how", ["accelerate_config", "config", "inside", "option"])
def test_trl_launches_by_accelerate(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``trl sft`` is seen as a launcher, wherever it is told of the key."""
    from tp_plugin.launch import accelerate_cli, autoload

    launch, own = tmp_path / "launch.yaml", tmp_path / "sft.yaml"
    launch.write_text("num_processes: 2\ntp_size: 2\n")
    own.write_text(f"accelerate_config: {launch}\n" if how == "inside" else "tp_size: 2\n")
    argv = ["/bin/trl", "sft", *{
        "accelerate_config": ["--accelerate_config", str(launch)], "config": ["--config", str(own)],
        "inside": ["--config", str(own)], "option": ["--tp_size", "2"],
    }[how]]  # fmt: skip
    awaited: list[str] = []
    monkeypatch.setattr(accelerate_cli, "after_import", lambda name, action: awaited.append(name))
    monkeypatch.delenv("TP_PLUGIN_TP_SIZE", raising=False)
    assert autoload._is_accelerate_launch(argv)
    accelerate_cli.register(argv)
    assert awaited == ["accelerate.commands.config.config_args", "accelerate.commands.launch"]
    awaited.clear()
    accelerate_cli.register(["/bin/trl", "sft", "--learning_rate", "1"])
    assert not awaited
