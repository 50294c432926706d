"""torch.compile of a model that is cut into stages: each layer is a graph, and the numbers are those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import test_pipeline
import torch
from accelerate.utils import other
from models import config_for
from test_pipeline import check, losses_with_dropout
from workers import run, sees_whole

from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.accelerate import utilities
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize

STEPS = 1


def compiled(what: str, backend: str, model: Any) -> Any:
    """The ``whole`` model, the same ``in place``, its ``layers``, or Accelerate's ``regions``."""
    if what == "whole":
        return torch.compile(model, backend=backend)
    if what == "regions":
        return other.compile_regions(model, backend=backend)
    for module in [model] if what == "in place" else model.model.layers:
        module.compile(backend=backend)
    return model


def begin() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    utilities.install(other)


@sees_whole
def case(what: str, tp: int, loss: str = "models_own", how: str = "as_it_is", backend: str = "aot_eager") -> Any:
    begin()
    options = {"pp_size": 2, "pipeline_microbatches": 5}
    found = test_pipeline.case("llama", tp, options, loss, how, functools.partial(compiled, what, backend), STEPS)
    return found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


@pytest.mark.parametrize(
    ("what", "tp", "loss", "how"),
    [
        ("whole", 1, "scripts_own", "as_it_is"),
        pytest.param("regions", 1, "models_own", "as_it_is", marks=pytest.mark.full),
        pytest.param("whole", 1, "models_own", "as_it_is", marks=pytest.mark.full),
        pytest.param("in place", 2, "models_own", "checkpointing", marks=pytest.mark.full),
        pytest.param("layers", 2, "models_own", "as_it_is", marks=pytest.mark.full),
    ],
)
def test_compiled(what: str, tp: int, loss: str, how: str) -> None:
    results = run(2 * tp, case, what, tp, loss, how)
    check(results)
    if how != "checkpointing":  # (which notes on a layer, the first time, whether it drops anything: eager mode)
        assert all(found["graphs"] >= 2 for found in results), [found["graphs"] for found in results]


def regions() -> bool:
    """Of the model that is called, not of a copy whose forward calls the layers of the first."""
    begin()
    stop()
    model = build(config_for("llama", num_hidden_layers=4), meta=False)
    parallelize(model, 1, options=RunConfig(1, pp_size=2))
    found = compiled("regions", "aot_eager", model)
    stop()
    return found is model and all(layer._compiled_call_impl is not None for layer in model.model.layers)


def test_regions_are_compiled_in_place() -> None:
    assert run(2, regions) == [True, True]


@pytest.mark.full  # a C++ compiler
def test_inductor() -> None:
    check(run(2, case, "whole", 1, "models_own", "as_it_is", "inductor"))


@sees_whole
def dropped(what: str) -> list[float]:
    begin()
    trained = functools.partial(compiled, what, "aot_eager") if what else test_pipeline.as_it_is
    return losses_with_dropout(2, "as_it_is", trained, 0.0)  # of attention, a compiler draws others in eager mode, too


@pytest.mark.full
def test_dropout() -> None:
    expected = run(2, dropped, "")
    for found in run(2, dropped, "whole"):
        assert found == pytest.approx(expected[0], rel=1e-5)
