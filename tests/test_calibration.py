"""``tp-plugin plan --calibrate``: what it measures, what it makes of that, and the plan that goes by it.

Times are made up here, but for one run of the command; whether real ones are good is no matter of a test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config_for

from tp_plugin.cli import plan_calibrate
from tp_plugin.cli.main import main
from tp_plugin.cli.plan import planner
from tp_plugin.estimate.calibration import NAMES, Calibration, Samples, Timed, fit, seconds_of
from tp_plugin.estimate.hardware import GPUS
from tp_plugin.estimate.job import Cluster, Job
from tp_plugin.estimate.ledger import Work
from tp_plugin.estimate.timing import Rates, product

WIDE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_key_value_heads": 8, "num_attention_heads": 8, "head_dim": 8, "use_cache": False}  # fmt: skip
TRUE = Rates(product=0.5, half=50.0, attention=0.3, memory=0.6, head=2.5, optimizer=0.4, kernel=8e-6, latency=3e-5)
GPU = replace(GPUS["h100"], peak=1e13, bandwidth=1e11, link=2e10)


def samples() -> Samples:
    """What a machine of these constants would have measured, in 32 bits."""
    sizes = [(1, 4096, 512, 512), (1, 512, 512, 2048), (1, 4096, 64, 512), (8, 512, 128, 512), (1, 4096, 2048, 512)]
    products = [(*shape, float(product(*shape, TRUE, GPU, 4.0))) for shape in sizes]

    def work(tokens: int, kernels: int) -> list[Work]:
        shapes = [(1, tokens, 512, 2048, "m"), (1, 512, tokens, 2048, "k")]
        return [Work(shapes, 1e6 * tokens, 1e5 * tokens, kernels)]

    short, long, around = work(16, 60), work(4096, 60), work(2048, 5)
    alone = replace(TRUE, kernel=0.0)
    return Samples(
        4.0, products, (1e9, 1e9 / 1e11), (1e10, 1e10 / (GPU.peak * TRUE.attention)),
        Timed(short, seconds_of(short, TRUE, GPU, 4.0)), Timed(long, seconds_of(long, TRUE, GPU, 4.0)),
        Timed(around, TRUE.head * seconds_of(around, alone, GPU, 4.0)), (1e6, 34e6 / (GPU.bandwidth * TRUE.optimizer)),
        2e-3, [(size, TRUE.latency + size / 1e10) for size in (1e3, 1e5, 1e7)],
    )  # fmt: skip


def test_constants_that_made_the_times_are_found() -> None:
    gpu, rates = fit(samples(), GPUS["a100-80"], 1e10, "mine")
    assert gpu.peak * rates.product == pytest.approx(GPU.peak * TRUE.product)  # only together do they mean anything
    assert gpu.peak * rates.attention == pytest.approx(GPU.peak * TRUE.attention)
    assert gpu.link * rates.link == pytest.approx(1e10) and rates.latency == pytest.approx(TRUE.latency)
    for name in ("half", "memory", "head", "optimizer", "kernel"):
        assert getattr(rates, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert rates.step == pytest.approx(2e-3) and gpu.memory == 1e10
    assert gpu.network == GPUS["a100-80"].network and rates.network == Rates().network
    assert {"network", "hop", "hidden", "data_link", "stage"}.isdisjoint(rates.measured) and "head" in rates.measured
    for each in (samples().short, samples().long):
        assert seconds_of(each.work, rates, gpu, 4.0) == pytest.approx(each.seconds, rel=1e-3)


def test_times_that_no_constants_make() -> None:
    """Noise gives positive and finite ones."""
    odd = samples()
    odd.products = [(b, m, k, n, 1e-3 * (1 + at % 2)) for at, (b, m, k, n, _) in enumerate(odd.products)]
    odd.collectives = [(1e3, 1e-3), (1e5, 1e-3), (1e7, 0.9e-3)]
    odd.long = Timed(odd.long.work, 1e-9)
    odd.step = -1.0
    gpu, rates = fit(odd, GPUS["h100"], 1e10, "mine")
    for name in rates.measured:
        value = getattr(rates, name)
        assert math.isfinite(value) and value >= 0, (name, value)
    assert rates.product > 0 and rates.memory > 0 and rates.attention > 0 and gpu.link > 0


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_for("llama", **WIDE).to_dict()))
    return str(path)


ASKED = ["--gpus", "2", "--sequence", "32", "--global-batch", "8", "--dtype", "fp32"]


def test_what_is_measured(config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing once, and computed as the trace says: the layer's own products, of the model's shapes."""
    seen: list[str] = []

    def watch(what: str, call: Callable[[], Any]) -> float:
        call()
        seen.append(what)
        return 1e-3 * len(seen)

    ranks: list[int] = []

    def on_ranks(world: int, function: Any, *given: Any) -> list[Any]:
        ranks.append(world)
        return [[(size, 1e-4 + size / 1e9 + 1e-5 * rank) for size in (1e3, 1e6)] for rank in range(world)]

    monkeypatch.setattr(plan_calibrate, "run_on_ranks", on_ranks)
    monkeypatch.setattr(plan_calibrate, "_local_sizes", lambda planner: [2])
    asked = planner(config_file, Cluster(2), Job(sequence=32, global_batch=8, dtype="fp32"))
    found = plan_calibrate.measure(asked, torch.device("cpu"), 1e10, watch)
    assert [what for what in seen if not what.startswith("product")] == [
        "copy", "layer long", "layer short", "model", "optimizer", "step", "attention",
    ]  # fmt: skip
    shapes = {tuple(sorted(row[1:4])) for row in found.products}
    assert {(32, 64, 64), (32, 64, 128), (32, 32, 64), (32, 64, 256)} <= shapes, "whole, halved, head"
    assert len(found.products) == len(set(found.products)) <= plan_calibrate.PRODUCTS
    assert ranks == [2] and found.collectives == [(1e3, 1e-4 + 1e-6 + 1e-5), (1e6, 1e-4 + 1e-3 + 1e-5)]
    layer = sum(2 * 32 * (4 * 64 * 64 + 3 * 64 * 128) for _ in range(1))
    products = [sum(2.0 * b * m * k * n for b, m, k, n, _ in work.products) for work in found.long.work]
    assert products == [layer, 2 * layer]
    small = [sum(2.0 * b * m * k * n for b, m, k, n, _ in work.products) for work in found.short.work]
    assert small == [layer / 2, layer]
    assert found.short.kernels == found.long.kernels > 0


def made_up(config_file: str, folder: Path) -> str:
    gpu, rates = fit(samples(), GPUS["h100"], 1e10, "mine")
    file = folder / "calibration.json"
    Calibration(rates, gpu, "fp32", "llama").write(file)
    assert [path.name for path in folder.glob("calibration*")] == ["calibration.json"]
    return str(file)


def test_a_plan_by_it(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds are those of the formulas with its constants; it is said which are measured."""
    file = made_up(config_file, tmp_path)
    assert main(["plan", config_file, *ASKED, "--calibration", file]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("tokens/s/GPU", " ms", "2 × mine", "Measured: product, half, attention", "Assumed: collective"):
        assert words in shown, (words, shown)
    fixed = ["--tp", "1", "--pp", "1", "--micro-batch", "1", "--engine", "ddp", "--no-checkpointing"]
    assert main(["plan", config_file, *ASKED, *fixed, "--calibration", file, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["seconds_are"] == "measured constants" and data["gpu"]["name"] == "mine"
    assert set(data["rates"]["measured"]) == set(Calibration.read(Path(file)).rates.measured) < set(NAMES)
    (best,) = data["candidates"]
    read = Calibration.read(Path(file))
    assert best["time"]["rest"] == read.rates.step and read.gpu is not None
    asked = planner(config_file, Cluster(2), Job(sequence=32, global_batch=8, dtype="fp32"))
    elements = sum(p.numel() for p in asked.model.parameters())
    assert best["time"]["optimizer"] == pytest.approx(34 * elements / (read.gpu.bandwidth * read.rates.optimizer))
    assert best["seconds"] == pytest.approx(sum(best["time"].values()))


def test_bad_files(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = made_up(config_file, tmp_path), tmp_path / "other.json"
    other.write_text('{"rates": {"products": 1}}')
    for given, words in (
        (["--calibration", str(other)], "unknown products; known are product, half"),
        (["--calibration", file, "--dtype", "bf16"], "was measured in fp32, the plan is for bf16"),
        (["--calibration", file, "--gpu", "h100"], "has the figures of mine; leave it out"),
        (["--calibration", file, "--calibrate", str(tmp_path / "new.json")], "give one of them"),
        (["--calibrate", str(tmp_path / "no" / "new.json")], "there is no such folder"),
    ):  # fmt: skip
        assert main(["plan", config_file, *ASKED, *given]) == 2, given
        assert words in capsys.readouterr().err, given
    other.write_text('{"rates": {"product": 0.7}}')
    assert main(["plan", config_file, *ASKED, "--calibration", str(other), "--gpu", "h200"]) == 0
    assert "× h200" in capsys.readouterr().out


def test_the_command(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real times, of which nothing is asserted; then a plan."""
    for name, value in (("LONG_ENOUGH", 0.0), ("SIZES", (1024, 4096)), ("PRODUCTS", 2)):
        monkeypatch.setattr(plan_calibrate, name, value)
    file = str(tmp_path / "calibration.json")
    assert main(["plan", config_file, *ASKED, "--calibrate", file]) == 0
    assert "Measured: product" in capsys.readouterr().out
    assert main(["plan", config_file, *ASKED, "--calibration", file]) == 0
    assert "tokens/s/GPU" in capsys.readouterr().out
