"""``tp_size`` in a DeepSpeed config: every place it may stand in, and what is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launch import LOOKS, decide, launch, seen

from tp_plugin.config.deepspeed import as_mapping, read, without_our_keys
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.deepspeed.config import REFUSED, check_batch_sizes, refuse
from tp_plugin.engines.deepspeed.initialize import _refuse_arguments, _run_config
from tp_plugin.errors import TPError
from tp_plugin.launch import deepspeed_config

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
"""
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


def inner(tmp_path: Path, **keys: Any) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO | keys))
    return f"deepspeed_config:\n  deepspeed_config_file: {path}\n"


def test_in_the_json_that_the_yaml_names(tmp_path: Path) -> None:
    config = CONFIG + inner(tmp_path, tp_size=2, tp_plugin={"audit_every": 5})
    assert seen(launch(tmp_path, config)) == ['SEES 2 {"audit_every": 5} 1 False', 'SEES 2 {"audit_every": 5} 1 True']


def test_in_the_json_that_the_script_is_given(tmp_path: Path) -> None:
    """`accelerate launch train.py --deepspeed ds.json`, of which Accelerate knows nothing."""
    inner(tmp_path, tp_size=2, tp_plugin={"fuse": True})
    config = CONFIG.replace("DEEPSPEED", "MULTI_CPU")
    result = launch(tmp_path, config, script=LOOKS, to_script=("--deepspeed", str(tmp_path / "ds.json")))
    assert seen(result) == ['SEES 2 {"fuse": true} 2 0', 'SEES 2 {"fuse": true} 2 1']


DECIDED: dict[str, tuple[str, dict[str, Any], str | list[str]]] = {
    # keys in the YAML, keys in the JSON → the message, or TP_PLUGIN_TP_SIZE and TP_PLUGIN_OPTIONS of the workers
    "they disagree": ("tp_size: 1\n", {"tp_size": 2}, "tp_size is 1 in the Accelerate config"),
    "another world": ("", {"tp_size": 3}, "tp_size: 3 does not divide num_processes: 2"),
    "AutoTP": (
        "",
        {"tp_size": 2, "tensor_parallel": {"autotp_size": 2}},
        "`tensor_parallel.autotp_size: 2` is incompatible",
    ),
    "hpZ": (
        "tp_size: 2\n",
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "zero_hpz_partition_size",
    ),
    "both, and the YAML's options count": (
        "tp_size: 2\ntp_plugin: {audit_every: 3}\n",
        {"tp_size": 2, "tp_plugin": {"audit_every": 5}},
        ["2", '{"audit_every": 3}'],
    ),
    "one key in each": ("tp_size: 2\n", {"tp_plugin": {"audit_every": 5}}, ["2", '{"audit_every": 5}']),
}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases: dict[str, tuple[list[str], dict[str, str]]] = {}
    for name, (outer, keys, _) in DECIDED.items():
        folder = tmp_path_factory.mktemp("decided")
        (folder / "config.yaml").write_text(CONFIG + outer + inner(folder, **keys))
        cases[name] = (["--config_file", str(folder / "config.yaml"), "x.py"], {})
    cases["no JSON"] = (["--config_file", str(folder / "plain.yaml"), "x.py"], {})
    (folder / "plain.yaml").write_text(CONFIG + "tp_size: 2\ndeepspeed_config:\n  zero_stage: 3\n")
    return decide(cases)


@pytest.mark.parametrize("case", DECIDED)
def test_before_anything_starts(decided: dict[str, list[Any]], case: str) -> None:
    expected, (*told, message) = DECIDED[case][2], decided[case]
    if isinstance(expected, str):
        assert message is not None and expected in message
    else:
        assert (told, message) == (expected, None)


def test_in_the_yaml_without_a_json(decided: dict[str, list[Any]]) -> None:
    assert decided["no JSON"] == ["2", "{}", None]


SWITCHED_ON = {
    "tensor_parallel.autotp_size": 2, "zero_optimization.zero_hpz_partition_size": 4,
    "zero_optimization.mics_shard_size": 2, "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zenflow": {"topk_ratio": 0.1}, "sequence_parallel_size": 2, "expert_parallel.enabled": True,
    "hybrid_engine.enabled": True, "compression_training": {"weight_quantization": {}}, "elasticity.enabled": True,
    "pipeline.stages": 2, "checkpoint.load_universal": True,
}  # fmt: skip


@pytest.mark.parametrize("path", list(REFUSED))
def test_each_refusal_names_its_key(path: str) -> None:
    config: dict[str, Any] = {}
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = SWITCHED_ON[path]
    with pytest.raises(TPError, match=path.replace(".", r"\.")):
        refuse(config, RunConfig(2))


@pytest.mark.parametrize("name", ["OneBitAdam", "Lamb", "Muon", "Adafactor"])
def test_optimizers_that_need_whole_tensors(name: str) -> None:
    with pytest.raises(TPError, match=r"optimizer\.type"):
        refuse({"optimizer": {"type": name}}, RunConfig(2))


class PipelineModule(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": PipelineModule(1, 1)}, "is a PipelineModule"),
        ({"model": torch.nn.Linear(1, 1), "mpu": object()}, "was given an mpu and tp_size=2"),
        ({"model": torch.nn.Linear(1, 1), "mesh_param": (1, 2)}, r"mesh_param \(Ulysses\)"),
    ],
)
def test_arguments_that_do_not_go(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TPError, match=message):
        _refuse_arguments(given, RunConfig(2))


def test_ordinary_configs_pass() -> None:
    refuse(
        ZERO | {"optimizer": {"type": "AdamW"}, "tensor_parallel": {"autotp_size": 0}, "elasticity": {}}, RunConfig(2)
    )


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TP_PLUGIN_TP_SIZE", "TP_PLUGIN_OPTIONS"):
        monkeypatch.setenv(name, "")  # what is published is taken back
    monkeypatch.delenv("TP_PLUGIN_DISABLE", raising=False)
    return monkeypatch


def test_one_place_is_enough(no_variables: pytest.MonkeyPatch) -> None:
    assert _run_config({}) == RunConfig()
    assert _run_config({"tp_size": 2, "tp_plugin": {"fuse": True}}) == RunConfig(2, fuse=True)
    assert _run_config({}) == RunConfig(2, fuse=True), "the other engines are not told"
    no_variables.setenv("TP_PLUGIN_OPTIONS", "")
    assert _run_config({"tp_plugin": {"audit_every": 3}}) == RunConfig(2, audit_every=3)
    with pytest.raises(TPError, match=r"tp_size is 2 in the environment .*, but 4 in the DeepSpeed config"):
        _run_config({"tp_size": 4})
    assert without_our_keys({"tp_size": 2, "tp_plugin": {}, "bf16": 1}) == {"bf16": 1}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"tp_size": "two"}, "tp_size: expected a whole number >= 1, found 'two' in the DeepSpeed config"),
        ({"tp_size": 2, "tp_plugin": {"sequenc": 1}}, "tp_plugin: unknown key 'sequenc' in the DeepSpeed config"),
        ({"zero_optimization": {"stage": 2, "tp_size": 2}}, "`zero_optimization.tp_size` in the DeepSpeed config has"),
    ],
)
def test_bad_keys(no_variables: pytest.MonkeyPatch, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TPError, match=message):
        _run_config(keys)


def test_deepspeeds_own_section_has_a_key_of_that_name() -> None:
    assert read({"tensor_parallel": {"tp_size": 2}}, "x").is_empty


@pytest.mark.parametrize("flag", ["--deepspeed", "--deepspeed_config", "--deepspeed-config", "--ds_config"])
def test_files_on_the_command_line(flag: str) -> None:
    assert deepspeed_config.file_in(["train.py", flag, "ds.json", "--x"]) == "ds.json"
    assert deepspeed_config.file_in(["train.py", f"{flag}=ds.json"]) == "ds.json"
    assert deepspeed_config.file_in(["train.py", "--deepspeed", flag, "ds.json"]) == "ds.json"


@pytest.mark.parametrize("config", [{"tensor_parallel": {"tp_size": 2}}, {"tp_size": 1}, {"tp_size": "1"}, {}])
def test_a_config_that_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    """DeepSpeed's own section has a key of that name; 1 is off."""
    monkeypatch.delenv("TP_PLUGIN_TP_SIZE", raising=False)
    assert not deepspeed_config.activate(config)
    assert "TP_PLUGIN_TP_SIZE" not in os.environ


def test_a_config_is_read_in_every_form(tmp_path: Path) -> None:
    import base64

    path = tmp_path / "ds.json"
    path.write_text('{\n  // a comment, as DeepSpeed allows\n  "tp_size": 2\n}')
    encoded = base64.urlsafe_b64encode(b'{"tp_size": 2}').decode()
    for form in (path, str(path), {"tp_size": 2}, '{"tp_size": 2}', encoded):
        assert as_mapping(form) == {"tp_size": 2}
    assert as_mapping("nothing/there.json") is as_mapping(None) is None


LATE = {
    "Trainer": (
        "from transformers import TrainingArguments\n"
        "args = TrainingArguments('out', deepspeed=CONFIG, report_to=[])\n"
        "say(args.world_size, args.process_index, args.should_save)\n"
    ),
    "Accelerate": (
        "from accelerate import Accelerator, DeepSpeedPlugin\n"
        "a = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))\n"
        "say(a.num_processes, a.process_index, a.is_main_process)\n"
    ),
    "initialize": (
        "import sys; sys.path.insert(0, TESTS)\nimport torch, deepspeed\nfrom models import build, config_for\n"
        "model = build(config_for('llama'))\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "import os\nCONFIG['train_batch_size'] = 4 * (int(os.environ['WORLD_SIZE']) // 2)  # 4 steps of 1 x dp\n"
        "engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)\n"
        "assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (4, 4)\n"
        "say(engine.dp_world_size, 0, model.lm_head.weight.tensor_model_parallel and not engine.global_rank)\n"
    ),
}
LATE["parallelize"] = LATE["initialize"].replace(
    "optimizer = ",
    "import tp_plugin\nmodel = tp_plugin.parallelize(model, tp_size=2)\nCONFIG.pop('tp_size')\noptimizer = ",
)


@pytest.mark.parametrize("library", list(LATE))
def test_a_dict_in_the_scripts_own_code(tmp_path: Path, library: str) -> None:
    script = tmp_path / "script.py"
    head = f"TESTS = {str(Path(__file__).parent)!r}\nCONFIG = {ZERO | {'tp_size': 2}!r}\n"
    head += "import sys\nsay = lambda *values: sys.stdout.write(' '.join(map(str, ['SEES', *values])) + '\\n')\n"
    script.write_text(head + LATE[library])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TP_PLUGIN", "TORCH_DEVICE"))}
    torchrun = [str(Path(sys.executable).parent / "torchrun")]
    if library == "Trainer":
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
    command = [*torchrun, "--standalone", "--nproc_per_node", "2", str(script)]
    before = set(os.listdir("/dev/shm"))
    result = subprocess.run(
        command, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen(result) == ["SEES 1 0 False", "SEES 1 0 True"]
    assert not any(name.startswith("deepspeed") for name in set(os.listdir("/dev/shm")) - before)


# --- batch sizes: world 4, tp 2, dp 2 ---------------------------------------------------------------------------------


def sizes(total: Any, micro: Any, steps: Any = None) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: value for key, value in zip(keys, (total, micro, steps), strict=True) if value is not None}


@pytest.mark.parametrize(
    "config",
    [
        sizes(16, 4, 2),  # of two processes
        sizes(8, 4, 1),
        sizes(8, 4),  # too small for four
        sizes(None, 4, 2),
        sizes(16, None, 2),
        sizes("auto", "auto", "auto"),
        sizes(24, 4, 5),  # wrong for two and for four: DeepSpeed's own message
    ],
)
def test_batch_sizes_that_have_one_meaning(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    before = dict(config)
    check_batch_sizes(config, RunConfig(2), 2)
    assert config == before and not caplog.records


def test_a_batch_size_that_counts_ranks_is_refused() -> None:
    with pytest.raises(TPError, match=r"write train_batch_size: 16 \(micro batch x steps x data-parallel size\)"):
        check_batch_sizes(sizes(32, 4, 2), RunConfig(2), 2)
    check_batch_sizes(sizes(32, 4, 2), RunConfig(), 4)  # plain


def test_without_steps_both_readings_fit_and_the_warning_says_which_one_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = sizes(16, 4)  # 4 x get_world_size() x 1, or 4 x (get_world_size() // 2) x 2
    check_batch_sizes(config, RunConfig(2), 2)
    assert config == sizes(16, 4)
    assert "means gradient_accumulation_steps: 2, because with tp_size=2 the 4 ranks are 2" in caplog.text
    caplog.clear()
    check_batch_sizes(config, RunConfig(2), 2, warn=False)
    assert not caplog.records
