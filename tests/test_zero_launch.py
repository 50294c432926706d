"""``tp_size`` in a DeepSpeed config: every place it may stand in, and what is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_launch import launch, seen

from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.deepspeed import batch
from tp_plugin.engines.deepspeed.batch import multiplied_by_world
from tp_plugin.engines.deepspeed.config import REFUSED, options_of, refuse, without_our_keys
from tp_plugin.engines.deepspeed.initialize import _refuse_arguments
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


def test_in_the_yaml_without_a_json(tmp_path: Path) -> None:
    lines = seen(launch(tmp_path, CONFIG + "tp_size: 2\ndeepspeed_config:\n  zero_stage: 3\n"))
    assert lines == ["SEES 2 {} 1 False", "SEES 2 {} 1 True"]


@pytest.mark.parametrize(
    "outer, keys, message",
    [
        ("tp_size: 1\n", {"tp_size": 2}, "tp_size is 1 in the Accelerate config"),
        ("", {"tp_size": 3}, "tp_size: 3 does not divide num_processes: 2"),
        ("", {"tp_size": 2, "tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel.autotp_size: 2` does not go"),
        ("tp_size: 2\n", {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    ],
)
def test_refused_before_anything_starts(tmp_path: Path, outer: str, keys: dict[str, Any], message: str) -> None:
    result = launch(tmp_path, CONFIG + outer + inner(tmp_path, **keys))
    assert result.returncode != 0 and "SEES" not in result.stdout
    assert message in result.stderr and "Traceback" not in result.stderr, result.stderr


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
        refuse(config, 2)


@pytest.mark.parametrize("name", ["OneBitAdam", "Lamb", "Muon", "Adafactor"])
def test_optimizers_that_need_whole_tensors(name: str) -> None:
    with pytest.raises(TPError, match=r"optimizer\.type"):
        refuse({"optimizer": {"type": name}}, 2)


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
    refuse(ZERO | {"optimizer": {"type": "AdamW"}, "tensor_parallel": {"autotp_size": 0}, "elasticity": {}}, 2)


def test_one_place_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TP_PLUGIN_TP_SIZE", "TP_PLUGIN_OPTIONS", "TP_PLUGIN_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    assert options_of({}, "x") == RunConfig()
    assert options_of({"tp_size": 2}, "x") == RunConfig(2)
    monkeypatch.setenv("TP_PLUGIN_TP_SIZE", "2")
    assert options_of({}, "x") == options_of({"tp_size": 2}, "x") == RunConfig(2)
    with pytest.raises(TPError, match="tp_size is 4 in x, but 2 in the environment"):
        options_of({"tp_size": 4}, "x")
    for keys, message in {
        "two": ({"tp_size": "two"}, "tp_size: expected a whole number >= 1, found 'two'"),
        "option": ({"tp_size": 2, "tp_plugin": {"sequenc": 1}}, "x: tp_plugin: unknown key 'sequenc'"),
        "nested": ({"zero_optimization": {"stage": 2, "tp_size": 2}}, "`zero_optimization.tp_size` in x has no effect"),
    }.values():
        with pytest.raises(TPError, match=message):
            options_of(keys, "x")
    assert without_our_keys({"tp_size": 2, "tp_plugin": {}, "bf16": 1}) == {"bf16": 1}


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
        assert deepspeed_config.read(form) == {"tp_size": 2}
    assert deepspeed_config.read("nothing/there.json") is deepspeed_config.read(None) is None


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
        "model = build(config_for('llama'))\nwhole = model.lm_head.weight.shape[0]\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)\n"
        "say(engine.dp_world_size, 0, model.lm_head.weight.shape[0] < whole and not engine.global_rank)\n"
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
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", str(script)]
    before = set(os.listdir("/dev/shm"))
    result = subprocess.run(
        command, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen(result) == ["SEES 1 0 False", "SEES 1 0 True"]
    assert not any(name.startswith("deepspeed") for name in set(os.listdir("/dev/shm")) - before)


@pytest.mark.parametrize(
    "line, by_world",
    [
        ("ds['train_batch_size'] = args.micro * torch.distributed.get_world_size() * args.steps", True),
        ("ds = {'train_batch_size': 2 * int(os.environ['WORLD_SIZE'])}", True),
        ("n = dist.get_world_size()\nds['train_batch_size'] = 4 * n", True),
        ("ds['train_batch_size'] = args.total\nprint(dist.get_world_size())", False),
        ("ds = {'train_batch_size': 32, 'world_size': 4}", False),
        ("no python", False),
    ],
)
def test_whether_a_script_multiplies_by_its_processes(line: str, by_world: bool) -> None:
    assert multiplied_by_world(line) is by_world


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, (12, 3)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (12, 3)),
        # of replicas already
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}, (24, 6)),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, (12, None)),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2}, ("auto", None)),
    ],
)
def test_batch_sizes_that_a_script_computes(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    monkeypatch.setattr(batch, "_script", lambda: "ds['train_batch_size'] = micro * world_size")
    batch.count_replicas(config, SimpleNamespace(tp_size=2, dp_size=2, is_leader=False))  # type: ignore[arg-type]
    assert (config["train_batch_size"], config.get("gradient_accumulation_steps")) == expected
