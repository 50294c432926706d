"""The key: where it is found, what it makes legal, what is refused, and what an idle process pays for the plugin."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tp_plugin.config import command_line, deepspeed, environment
from tp_plugin.config.misspelt import meant
from tp_plugin.config.resolve import current_config, resolve
from tp_plugin.config.run_config import RunConfig
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
"""
TRAINS = """\
import os, sys
from accelerate import Accelerator
a = Accelerator()
size, options = (os.environ.get("TP_PLUGIN_" + name) for name in ("TP_SIZE", "OPTIONS"))
sys.stdout.write(f"SEES {size} {options} {a.num_processes} {a.is_main_process}\\n")  # one write a rank
"""
LOOKS = """\
import os, sys
values = [os.environ.get(name) for name in ("TP_PLUGIN_TP_SIZE", "TP_PLUGIN_OPTIONS", "WORLD_SIZE", "RANK")]
sys.stdout.write(" ".join(map(str, ["SEES", *values])) + "\\n")
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` (output captured), with the plugin's variables only as given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "TORCH_DEVICE"))}
    env = {**kept, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter."""
    return run([sys.executable, "-c", code, *arguments], **environment)


def launch(
    tmp_path: Path, config: str, *arguments: str, script: str = TRAINS, to_script: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with ``config`` of a script that says what it sees."""
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "config.yaml").write_text(config)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words = ["--config_file", str(tmp_path / "config.yaml"), *arguments, str(tmp_path / "script.py"), *to_script]
    return run([*command, *words], **env)


def seen(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("SEES"))


DECIDE = """\
import json, os, sys
from accelerate.commands import launch
from trl.cli.accelerate_launcher import launch_training_script
before = dict(os.environ)
for arguments, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    said = None
    try:
        if arguments[0] == "trl":
            check = launch._validate_launch_command
            launch_training_script("sft.py", arguments[1:], [], launch_command_fn=check)
        else:
            launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    except SystemExit as stop:
        said = stop.code
    print("DECIDED", json.dumps([*map(os.environ.get, ("TP_PLUGIN_TP_SIZE", "TP_PLUGIN_OPTIONS")), said]))
    os.environ.clear()
    os.environ.update(before)
"""


def decide(cases: dict[str, tuple[list[str], dict[str, str]]]) -> dict[str, list[Any]]:
    """What the launcher decides for each (arguments, environment), all in one process that starts nothing.

    Returns for each case TP_PLUGIN_TP_SIZE, TP_PLUGIN_OPTIONS, and the message with which the launch ended, or None.
    """
    result = python(DECIDE, json.dumps(list(cases.values())))
    lines = [line.removeprefix("DECIDED") for line in result.stdout.splitlines() if line.startswith("DECIDED")]
    assert len(lines) == len(cases), result.stdout + result.stderr
    return dict(zip(cases, map(json.loads, lines), strict=True))


# --- without the key ------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_imported_or_patched() -> None:
    result = python(
        "import sys, torch, torch.nn.utils, accelerate, json\n"
        "print(json.dumps([sorted(m for m in sys.modules if m.startswith(('tp_plugin', 'model_policies'))),"
        "torch.nn.utils.get_total_norm.__module__, accelerate.Accelerator.prepare.__module__,"
        "accelerate.PartialState.__init__.__module__, accelerate.utils.operations.torch is torch]))"
    )
    modules, *owners = json.loads(result.stdout)
    config = ["", ".config", ".config.environment", ".config.keys"]
    light = [*config, ".launch", ".launch.autoload", ".launch.deepspeed_config", ".launch.imports"]
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


def test_what_a_run_with_the_key_imports_more() -> None:
    """The time that it takes to start is that of what it imports; the compiler, above all, is left to who compiles."""
    imports = "import sys, torch, transformers, accelerate; print(*sorted(sys.modules))"
    with_key, plain = (set(python(imports, TP_PLUGIN_TP_SIZE=size).stdout.split()) for size in ("2", "1"))
    more = with_key - plain
    assert len({name for name in more if name.startswith(("tp_plugin", "model_policies"))}) <= 220
    others = sorted(name for name in more if not name.startswith(("tp_plugin", "model_policies")))
    assert len(others) <= 30, others  # the compiler alone is 900
    assert not any(name.startswith(("torch._dynamo", "torch._inductor", "sympy")) for name in others)


@pytest.mark.parametrize("first", ["accelerate", "torch", "transformers"])
def test_the_compiler_may_be_imported_at_any_time(first: str) -> None:
    """It imports modules that are patched; by then it is half imported itself."""
    result = python(f"import {first}, torch._dynamo, torch.distributed.fsdp; print('fine')", TP_PLUGIN_TP_SIZE="2")
    assert result.stdout.strip().endswith("fine"), result.stderr


# --- accelerate launch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MULTI_CPU", "MULTI_GPU"])
def test_key_in_the_file(tmp_path: Path, kind: str) -> None:
    keys = "tp_size: 2\ntp_plugin:\n  audit_every: 3\n"
    lines = seen(launch(tmp_path, CONFIG.replace("MULTI_CPU", kind) + keys))
    assert lines == ['SEES 2 {"audit_every": 3} 1 False', 'SEES 2 {"audit_every": 3} 1 True']


BIN = Path(sys.executable).parent
LAUNCHES_ITSELF = """\
import sys
from accelerate.commands.launch import launch_command, launch_command_parser
launch_command(launch_command_parser().parse_args(sys.argv[1:]))
"""
FORMS = {
    "accelerate-launch": [str(BIN / "accelerate-launch")],
    "python -m accelerate.commands.launch": [sys.executable, "-m", "accelerate.commands.launch"],
    "launch_command in a script": [sys.executable, "-c", LAUNCHES_ITSELF],
}
"""Beside `python -m accelerate.commands.accelerate_cli launch`, which :func:`launch` is, like `accelerate launch`."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_launcher_knows_the_key(tmp_path: Path, form: str) -> None:
    config, script = tmp_path / "config.yaml", tmp_path / "script.py"
    config.write_text(CONFIG + "tp_size: 2\n")
    script.write_text(LOOKS)
    assert seen(run([*FORMS[form], "--config_file", str(config), str(script)])) == ["SEES 2 {} 2 0", "SEES 2 {} 2 1"]


NOTEBOOK = """\
import os, sys
from accelerate import Accelerator, notebook_launcher
os.environ["TP_PLUGIN_TP_SIZE"] = "2"  # in a later cell than the imports
def main():
    a = Accelerator(cpu=True)
    sys.stdout.write(f"SEES {a.num_processes} {a.is_main_process}\\n")
notebook_launcher(main, num_processes=2, use_port=sys.argv[1])
"""


def test_notebook_launcher() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert seen(python(NOTEBOOK, port)) == ["SEES 1 False", "SEES 1 True"]


def test_without_the_plugin_accelerate_would_refuse_the_key(tmp_path: Path) -> None:
    result = launch(tmp_path, CONFIG + "tp_size: 2\n", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "unknown keys (['tp_size'])" in result.stderr, "Accelerate changed: is tp_size its own key now?"


ACCEPTED: dict[str, tuple[str, list[str], dict[str, str], list[str | None]]] = {
    # keys in the file, arguments, environment → TP_PLUGIN_TP_SIZE and TP_PLUGIN_OPTIONS of the workers
    "no key": ("", [], {}, [None, None]),
    "the file": ("tp_size: 2\ntp_plugin: {audit_every: 3}\n", [], {}, ["2", '{"audit_every": 3}']),
    "off": ("tp_size: 1\n", [], {}, ["1", "{}"]),
    "an option": ("", ["--tp_size", "2"], {}, ["2", "{}"]),
    "an option with dashes": ("", ["--tp-size=2"], {}, ["2", "{}"]),
    "an option before the file": ("tp_size: 1\n", ["--tp_size", "2"], {}, ["2", "{}"]),
    "options as an option": ("tp_size: 2\n", ["--tp_plugin", "{fuse: true}"], {}, ["2", '{"fuse": true}']),
    "the environment": (
        "",
        [],
        {"TP_PLUGIN_TP_SIZE": "2", "TP_PLUGIN_OPTIONS": '{"fuse": true}'},
        ["2", '{"fuse": true}'],
    ),
    "the file before the environment": ("tp_size: 2\n", [], {"TP_PLUGIN_TP_SIZE": "1"}, ["2", "{}"]),
    "disabled": ("tp_size: 2\n", [], {"TP_PLUGIN_DISABLE": "1"}, [None, None]),
    "trl": ("tp_size: 2\n", ["trl"], {}, ["2", "{}"]),
    "trl's own file": ("", ["trl", "--tp_size", "2", "--tp_plugin", "{'fuse': True}"], {}, ["2", '{"fuse": true}']),
}
REFUSED = {
    "another world": ("tp_size: 3\n", "tp_size: 3 does not divide num_processes: 2"),
    "a word": ("tp_size: two\n", "tp_size: expected a whole number >= 1, found 'two' in the Accelerate config"),
    "unknown key": ("tp_size: 2\ntp_plugin: {audit: 3}\n", "tp_plugin: unknown key 'audit' in the Accelerate config"),
    "near a known key": (
        "tp_size: 2\ntp_plugin: {sequence-paralel: true}\n",
        "unknown key 'sequence-paralel' in the Accelerate config",
        "did you mean `sequence_parallel`?",
    ),
    "the size among the options": ("tp_plugin: {tp_size: 2}\n", "belongs beside `tp_plugin`, not into it"),
    "a dash": ("tp-size: 2\n", "unknown key `tp-size` in the Accelerate config: did you mean `tp_size`?"),
    "no dash": ("tpsize: 2\n", "did you mean `tp_size`?"),
    "two letters swapped": ("tp_szie: 2\n", "did you mean `tp_size`?"),
    "another's name": ("tensor_parallel_size: 2\n", "did you mean `tp_size`?"),
    "options with a dash": ("tp_size: 2\ntp-plugin: {fuse: true}\n", "did you mean `tp_plugin`?"),
    "no mapping": ("tp_size: 2\ntp_plugin: 7\n", "tp_plugin: expected a mapping"),
    "nested": ("parallelism_config:\n  tp_size: 2\n", "`parallelism_config.tp_size: 2` has no effect there"),
    "both": (
        "tp_size: 2\nparallelism_config:\n  parallelism_config_tp_size: 2\n",
        "keep the top-level `tp_size` and remove the other",
    ),
    "FSDP": ("tp_size: 2\nfsdp_config: {fsdp_version: 1}\n", "write fsdp_version: 2 in fsdp_config"),
}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder, cases = tmp_path_factory.mktemp("decided"), {}
    for name, (keys, *rest) in (ACCEPTED | REFUSED).items():
        config = folder / f"{name}.yaml"
        config.write_text((CONFIG.replace("MULTI_CPU", "FSDP") if name == "FSDP" else CONFIG) + keys)
        arguments, environment = rest[:2] if name in ACCEPTED else ([], {})
        launcher = ["trl"] if "trl" in arguments else []
        options = [word for word in arguments if word != "trl"]
        cases[name] = (
            [*launcher, "--config_file", str(config), *options, *([] if launcher else ["x.py"])],
            environment,
        )
    return decide(cases)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_workers_are_told(decided: dict[str, list[Any]], case: str) -> None:
    assert decided[case] == [*ACCEPTED[case][3], None]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(decided: dict[str, list[Any]], case: str) -> None:
    message = decided[case][2]
    assert message is not None and message.startswith("tp_plugin: ") and "upgrad" not in message
    assert all(words in message for words in REFUSED[case][1:])


@pytest.mark.parametrize("option", ["--tpsize", "--tensor_parallel_size", "--tensor-parallel-size"])
def test_a_misspelt_option(option: str) -> None:
    parser = argparse.ArgumentParser()
    command_line.add_options(parser)
    parser.add_argument("script")
    with pytest.raises(SystemExit, match=f"unknown option {option}: did you mean --tp_size"):
        parser.parse_args([option, "2", "x.py"])


@pytest.mark.parametrize("key", ["cp_size", "tensor_parallel", "tp_size", "tpu_zone", "tp_size_of_others"])
def test_keys_of_others_are_let_pass(key: str) -> None:
    assert not meant(key)


@pytest.mark.parametrize("key", ["tp-size", "tensor_parallel_size"])
def test_a_misspelt_key_in_a_deepspeed_config(key: str) -> None:
    """Also in one that only the script's code holds, which DeepSpeed would take without a word."""
    assert deepspeed.asks_for_us({key: 2})
    with pytest.raises(TPError, match=r"in ds\.json: did you mean `tp_size`"):
        deepspeed.read({key: 2}, "ds.json")


def test_a_refusal_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    result = launch(tmp_path, CONFIG + "tp_size: 3\n")
    assert result.returncode == 1 and "SEES" not in result.stdout
    assert "tp_plugin: tp_size: 3 does not divide" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_one_process_is_refused_when_the_state_is_made() -> None:
    result = python("from accelerate import Accelerator; Accelerator()", TP_PLUGIN_TP_SIZE="2")
    assert "tp_size=2 needs 2 processes or a multiple, but this is one process" in result.stderr


# --- RunConfig ------------------------------------------------------------------------------------------------------


def test_a_config_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.parse("4", {"policy": "a:B", "audit_every": 5, "leave_whole": ["bert"]})
    for name in ("TP_PLUGIN_TP_SIZE", "TP_PLUGIN_OPTIONS"):
        monkeypatch.setenv(name, "")  # so that it is taken back
    monkeypatch.delenv("TP_PLUGIN_DISABLE", raising=False)
    environment.publish(config.as_written())
    assert current_config() == config == RunConfig(4, policy="a:B", audit_every=5, leave_whole=("bert",))
    monkeypatch.setenv("TP_PLUGIN_DISABLE", "1")
    assert current_config() == RunConfig()


def test_the_precedence_is_one() -> None:
    places = {
        "command_line": Written("the command line", 2, {"audit_every": 1}),
        "accelerate_yaml": Written("the file", 4, {"audit_every": 2}),
        "environment": Written("the environment", 8, {"audit_every": 3}),
        "deepspeed": Written("ds.json", None, {"audit_every": 4}),
    }
    for audit_every, (size, place) in enumerate(zip((2, 4, 8, 1), list(places), strict=True), start=1):
        assert resolve(**places) == RunConfig(size, audit_every=audit_every)
        del places[place]
    assert resolve() == RunConfig()
    # each key by itself
    assert resolve(command_line=Written("x", "2"), environment=Written("y", None, {"fuse": True})) == RunConfig(
        2, fuse=True
    )


@pytest.mark.parametrize("place", ["command_line", "accelerate_yaml", "environment"])
def test_a_deepspeed_config_must_agree(place: str) -> None:
    inner = Written("ds.json", 2)
    assert resolve(**{place: Written("here", "2")}, deepspeed=inner) == RunConfig(2)
    with pytest.raises(TPError, match=r"tp_size is 4 in here, but 2 in ds\.json; write it in one place"):
        resolve(**{place: Written("here", 4)}, deepspeed=inner)


@pytest.mark.parametrize(("written", "every"), [("always", 1), ("off", 0), (False, 0), (10, 10), ("10", 10)])
def test_how_often_the_guard_compares(written: Any, every: int) -> None:
    """YAML takes ``off`` for false."""
    config = RunConfig.parse(2, {"guard": written})
    assert config == RunConfig(2, guard=every)
    assert RunConfig.parse(2, config.as_written().options) == config


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
        ({"guard": "never"}, r"tp_plugin\.guard: expected always, off or a whole number of forwards, found 'never'"),
        ({"guard": -1}, r"tp_plugin\.guard: expected always, off or a whole number"),
        ({"guard": True}, r"tp_plugin\.guard: expected always, off or a whole number"),
    ],
)
def test_bad_options(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(TPError, match=message):
        RunConfig.parse(2, mapping)
