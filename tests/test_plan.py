"""``tp-plugin plan``: its figures, answers, files, and what it refuses. (Against real runs: test_plan_memory.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import config_for

import tp_plugin
from tp_plugin.cli.main import main
from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.estimate.hardware import GIB, GPUS, Gpu
from tp_plugin.estimate.job import Candidate, Cluster, Job
from tp_plugin.estimate.memory import activations, checkpointed, layers_of_stage
from tp_plugin.estimate.trace import cut, find_layers, trace
from tp_plugin.policy import make_plan, policy_for

WIDE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_key_value_heads": 4, "use_cache": False}  # fmt: skip


def planned(config: Any = None, gpus: int = 8, gpu: Gpu | str = "h100", **job: Any) -> list[Candidate]:
    config = config or config_for("llama", **WIDE)
    return tp_plugin.plan(config, Cluster(gpus, gpu=gpu), Job(**{"sequence": 128, "global_batch": 32, **job}))


def traced(tp: int, *, checkpointing: bool = False, size: int = 2, layers: int = 6, **options: bool) -> Any:
    config = config_for("llama", **WIDE | {"num_hidden_layers": layers})
    model, policy = build(config, meta=True), policy_for(config)
    stacks_of = find_layers(model, make_plan(model, policy, tp))
    ids = torch.zeros(size, 64, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids}
    small = cut(model, stacks_of)
    return trace(small, policy, stacks_of, batch, tp, RunConfig(tp, **options), checkpointing)


def figures(step: Any) -> list[tuple[Any, ...]]:
    return [(key, s.kept, s.peak, s.gradients, s.sent) for key, s in (*step.forward, *step.backward)]


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}], ids=["whole", "sequence"])
def test_layers_that_were_cut_out_are_like_those_that_stand_for_them(options: dict[str, bool]) -> None:
    """Six layers of which three are traced, against three of three: each kind of place has the same figures."""
    six, three = traced(2, **options), traced(2, layers=3, **options)
    assert [key for key, _ in six.forward] == [("", 0), *(("model.layers", n) for n in range(6)), ("", 1)]
    assert [key for key, _ in six.backward] == [("", 1), *(("model.layers", n) for n in reversed(range(6))), ("", 0)]
    places = [0, 1, 1, 1, 1, 2]
    ends = dict(three.forward), dict(three.backward)
    for found, small in zip((six.forward, six.backward), ends, strict=True):
        for (path, number), segment in found:
            like = small[path, places[number] if path else number]
            assert (segment.kept, segment.peak, segment.gradients) == (like.kept, like.peak, like.gradients)


def test_checkpointing_derived_is_checkpointing_traced() -> None:
    plain, real = traced(2), traced(2, checkpointing=True)
    derived = checkpointed(plain)
    assert activations(derived, 1, grow=True)[1] == pytest.approx(activations(real, 1, grow=True)[1], rel=0.002)
    assert activations(derived, 1, grow=True)[0] == pytest.approx(activations(real, 1, grow=True)[0], rel=0.002)
    assert activations(derived, 1, grow=True)[0] < 0.2 * activations(plain, 1, grow=True)[0]


def test_collectives_are_those_of_the_plan() -> None:
    """Two all-reduces a layer and direction, of the hidden states; with sequence parallelism gathers and scatters."""
    step = traced(2)
    hidden = 2 * 64 * 128 * 4
    for key, segment in (*step.forward, *step.backward):
        if key[0]:
            assert segment.sent == {("all_reduce", hidden): 2}
    split = traced(2, sequence_parallel=True)
    middle = dict(split.forward)["model.layers", 2].sent
    assert middle == {("all_gather", hidden // 2): 2, ("reduce_scatter", hidden): 2}


def test_stages_hold_all_layers_once() -> None:
    for layers, pp in ((61, 16), (32, 4), (5, 5)):
        held = [list(layers_of_stage(layers, pp, stage)) for stage in range(pp)]
        assert [n for stage in held for n in stage] == list(range(layers)) and max(map(len, held)) - min(
            map(len, held)
        ) <= 1


def test_answers() -> None:
    found = planned()
    assert found[0].verdict == "fits" and found[0].seconds == min(c.seconds for c in found)
    layouts = [candidate.layout for candidate in found]
    assert all(x.tp * x.pp * x.dp == 8 and x.micro_batch * x.accumulation * x.dp == 32 for x in layouts)
    assert {x.engine for x in layouts} == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    assert {x.tp for x in layouts} == {1, 2, 4} and max(x.pp for x in layouts) > 1
    assert all(
        candidate.time and sum(candidate.time.values()) == pytest.approx(candidate.seconds) for candidate in found
    )
    json.dumps([candidate.as_dict() for candidate in found])


def test_what_each_thing_saves() -> None:
    """Of one layout, one thing changed at a time."""

    def held(**changes: Any) -> Any:
        given = {
            "tp": 2,
            "pp": 1,
            "micro_batch": 2,
            "engine": "ddp",
            "checkpointing": False,
            "sequence_parallel": False,
        }
        (found,) = planned(**{**given, **changes})
        return found.memory

    plain = held()
    assert plain.low < plain.high
    assert held(checkpointing=True).parts["activations"] < 0.2 * plain.parts["activations"]
    assert held(sequence_parallel=True).parts["activations"] < 0.8 * plain.parts["activations"]
    assert held(micro_batch=4).parts["activations"] == pytest.approx(2 * plain.parts["activations"], rel=0.01)
    bytes_of = 2 * plain.parts["optimizer"]  # in bf16, two of a weight's size; ZeRO: 4 + 8 bytes over 4 replicas
    assert held(engine="zero1").parts["optimizer"] == pytest.approx(bytes_of * 12 / 4 / 8, rel=0.01)
    assert held(engine="zero3").parts["weights"] == pytest.approx(plain.parts["weights"] / 4, rel=0.01)
    assert held(engine="fsdp2").parts["weights"] == pytest.approx(2 * plain.parts["weights"] / 4, rel=0.05)
    assert held(tp=4).parts["weights"] == pytest.approx(plain.parts["weights"] / 2, rel=0.02)
    lora = held(lora_rank=8)
    assert lora.parts["gradients"] < 0.3 * plain.parts["gradients"]
    assert held(lora_rank=8, quantized="nf4").parts["weights"] < 0.6 * lora.parts["weights"]
    assert held(optimizer="adamw_8bit").parts["optimizer"] < 0.6 * plain.parts["optimizer"]
    assert held(optimizer="adafactor").parts["optimizer"] < 0.1 * plain.parts["optimizer"]
    assert held(attention="eager", sequence=256).parts["activations"] > held(sequence=256).parts["activations"]
    halves = held(pp=2)
    assert halves.parts["weights"] < 0.7 * plain.parts["weights"]


def test_verdicts_follow_the_memory() -> None:
    (small,) = planned(tp=1, pp=1, micro_batch=1, engine="ddp", checkpointing=False)
    low, high = small.memory.low, small.memory.high
    for size, verdict in ((high / 0.94, "fits"), ((low + high) / 2 / 0.95, "tight"), (low, "out of memory")):
        gpu = Gpu("mine", 1e14, size, 1e12, 1e11, 1e10, "a test")
        (found,) = planned(tp=1, pp=1, micro_batch=1, engine="ddp", checkpointing=False, gpu=gpu)
        assert found.verdict == verdict


def test_architectures_of_other_kinds() -> None:
    """Encoder and decoder, experts, latent attention, pictures, tied embeddings in a pipeline."""
    for model_type in ("t5", "mixtral", "deepseek_v3", "gpt2", "vit", "gemma3"):
        fixed = {"tp": 2, "engine": "ddp", "sequence_parallel": False, "checkpointing": False}
        found = planned(config_for(model_type), gpus=4, sequence=32, global_batch=8, micro_batch=1, **fixed)
        assert found[0].verdict == "fits" and found[0].memory.parts["activations"] > 0, model_type


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_for("llama", **WIDE).to_dict()))
    return str(path)


ASKED = ["--gpus", "8", "--sequence", "128", "--global-batch", "32"]


def test_what_is_printed(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config_file, *ASKED, "--tokens", "1e9", "--write", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "Layouts, best first", "fits", "GiB per rank", "activations", "bubble", "num_processes: 8",
        "with checkpointing", "legal tp: 1, 2, 3, 4", "would hold it", "hours",
        "for this ranking only", "weights + cache",
    ):  # fmt: skip
        assert words in " ".join(shown.split()), (words, shown)
    written = sorted(path.name for path in (tmp_path / "out").glob("*.yaml"))
    assert written == ["layout1.yaml", "layout2.yaml", "layout3.yaml"]
    for path in (tmp_path / "out").glob("*.yaml"):
        keys = yaml.safe_load(path.read_text())
        assert keys["num_processes"] == 8
        RunConfig.parse(keys.get("tp_size", 1), keys.get("tp_plugin"))
        if keys["distributed_type"] == "DEEPSPEED":
            ds = json.loads(Path(keys["deepspeed_config"]["deepspeed_config_file"]).read_text())
            assert ds["train_batch_size"] == 32
    assert main(["plan", config_file, *ASKED, "--write", str(tmp_path / "out")]) == 2
    assert "new or an empty folder" in capsys.readouterr().err


def test_data(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config_file, *ASKED, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["candidates"]) == 2 and found["legal_tp"] == [1, 2, 3, 4]
    assert found["seconds_are"] == "for ranking only" and found["least_gpus"] == 1
    assert {row["tp"] for row in found["inference"]} == {1, 2, 3, 4}
    assert found["candidates"][0]["memory"]["parts"]["weights"] > 0


def test_a_picture(config_file: str, tmp_path: Path) -> None:
    """Two axes: a stack of parts for each layout shown."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layouts.png"
    assert main(["plan", config_file, *ASKED, "--top", "2", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    import matplotlib.pyplot as plt

    from tp_plugin.cli.plan_plot import draw

    shown = planned()[:3]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plt, "close", lambda figure: None)
        draw(picture, shown, GPUS["h100"], timed=False)
    memory, time = plt.gcf().axes
    for axes, parts in ((memory, [c.memory.parts for c in shown]), (time, [c.time for c in shown])):
        assert len(axes.containers) == len(parts[0]) and all(len(stack) == 3 for stack in axes.containers)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(parts[0])
    tops = [sum(stack[at].get_height() for stack in memory.containers) for at in range(3)]
    assert tops == pytest.approx([c.memory.total / GIB for c in shown])
    plt.close()


def test_a_picture_that_cannot_be_drawn(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ["plan", config_file, *ASKED, "--write", str(tmp_path / "out"), "--plot"]
    assert main([*given, str(tmp_path / "layouts.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(use=lambda name: None))
    for path in ("layouts", "no/such/folder/layouts.png"):
        assert main([*given, path]) == 2
        assert "in a folder that exists" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_input(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message that says what could be written, exit 2, nothing written."""
    (tmp_path / "empty").mkdir()
    bad_gpu = tmp_path / "gpu.json"
    bad_gpu.write_text('{"peak": 1}')
    for arguments, words in (
        ([str(tmp_path / "empty"), *ASKED], "has no config.json"),
        (["no_such_model", *ASKED], "no model type"),
        ([config_file, *ASKED, "--gpu", "h101"], "known are a100-40"),
        ([config_file, *ASKED, "--gpu", str(bad_gpu)], "expected a JSON file with"),
        ([config_file, *ASKED, "--tp", "3"], "does not divide --gpus 8"),
        ([config_file, *ASKED, "--tp", "8"], "legal sizes are 1, 2, 3, 4"),
        ([config_file, "--gpus", "6", "--tp", "4"], "does not divide --gpus 6"),
        ([config_file, *ASKED, "--pp", "3"], "--pp 3"),
        ([config_file, *ASKED, "--micro-batch", "5"], "no multiple of micro-batch"),
        ([config_file, *ASKED, "--engine", "zero4"], "expected one of ddp"),
        ([config_file, *ASKED, "--lora", "all-linear"], "r=16,all-linear"),
        ([config_file, *ASKED, "--quantized", "nf4"], "add --lora"),
        ([config_file, *ASKED, "--dtype", "int8"], "expected one of bf16"),
        ([config_file, "--gpus", "12", "--gpus-per-node", "8"], "no whole number of machines"),
        ([config_file, *ASKED, "--script-config", "nothing.yaml"], "no such file"),
        ([config_file, *ASKED, "--calibration", "nothing.json"], "--calibration nothing.json"),
    ):  # fmt: skip
        out = tmp_path / "written"
        assert main(["plan", *arguments, "--write", str(out)]) == 2, arguments
        message = capsys.readouterr().err
        assert words in message and message.startswith("tp-plugin plan: "), (arguments, message)
        assert not out.exists()


def test_script_configs(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a config says counts as given; an argument goes before it; what it leaves open stays open."""
    examples = Path(__file__).parents[1] / "examples" / "configs"

    def layouts(name: Path, *more: str) -> list[dict[str, Any]]:
        given = [
            "--sequence",
            "128",
            "--global-batch",
            "32",
            "--script-config",
            str(name),
            "--json",
            "--top",
            "50",
            "--no-checkpointing",
        ]
        assert main(["plan", config_file, *given, *more]) == 0
        return [each["layout"] for each in json.loads(capsys.readouterr().out)["candidates"]]

    fsdp = layouts(examples / "tp2_dp2_fsdp2.yaml")
    assert all(x["tp"] == 2 and x["dp"] * x["pp"] == 2 and x["engine"] == "fsdp2" for x in fsdp)
    zero = layouts(examples / "tp2_zero2.yaml", "--gpus", "4")
    assert all(x["tp"] == 2 and x["engine"] == "zero2" and x["dp"] == 2 for x in zero)
    file = tmp_path / "ds.json"
    keys = {"tp_size": 2, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}
    file.write_text(json.dumps(keys | {"bf16": {"enabled": True}}))
    found = layouts(file, "--tp", "4")
    assert all(x["tp"] == 4 and x["engine"] == "zero3" and x["micro_batch"] == 4 for x in found)


def test_hardware_table_names_its_sources() -> None:
    assert set(GPUS) == {"a100-40", "a100-80", "h100", "h200", "b200", "l40s", "mi300x", "rtx4090"}
    for each in GPUS.values():
        assert each.source and 1e14 < each.peak < 3e15 and 20 * GIB < each.memory < 200 * GIB
        assert each.network < each.link < each.bandwidth


BIG = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # what two cores do in 30 seconds
from tp_plugin.cli.main import main
status = main(["plan", "deepseek_v3", "--gpus", "512", "--sequence", "4096", "--global-batch", "2048"])
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert used < 4 * 2**30, used
sys.exit(status)
"""


def test_a_model_of_671_billion_parameters() -> None:
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "671.03 B parameters" in done.stdout and "Config of the first" in done.stdout
