"""What may be sent in groups of devices: what the model computes with. Headers and objects go over ``unit_cpu``.

NCCL takes no host memory, so on a device every other message would fail, or wait for the device. Here all is on the
CPU; what a message is, is told by its type and by who sends it.
"""

from __future__ import annotations

import contextlib
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapted, batch, build, config_for
from test_parity import assert_parity, parity
from workers import WorkerError, run
from zoo import fresh

import tp_plugin
from tp_plugin.cli.parity_result import Result
from tp_plugin.mesh.groups import Group

DEVICE = ("tp", "replicas", "data")
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
"""What NCCL takes, besides: a vocabulary's places, counts."""
PLUGIN = str(Path(tp_plugin.__file__).parent)
FILES = tuple(f"mesh/{name}.py" for name in ("groups", "roles", "traced_ops"))


def room() -> str:
    """The room of the package that called the group."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PLUGIN) and not file.endswith(FILES):
            return file[len(PLUGIN) + 1 :].split("/")[0]
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Inside, groups of devices refuse what a device would not take."""
    enter = Group._enter

    def refusing(self: Group, op: str, tensor: torch.Tensor | None) -> list[Any]:
        if self.role in DEVICE:
            assert tensor is not None, f"{op} of objects in the {self.role} group"
            whole_numbers = room() == "tensor" and tensor.dtype in WHOLE_NUMBERS
            assert tensor.dtype in NUMBERS or whole_numbers, f"{op} of {tensor.dtype} in the {self.role} group"
        return enter(self, op, tensor)

    with unittest.mock.patch.object(Group, "_enter", refusing):
        yield


def checked_parity(model_type: str, overrides: dict[str, Any], tp: int, options: dict[str, Any]) -> Result:
    """Run on every rank: six steps with clipping, states, generation."""
    with checked():
        return parity(model_type, overrides, tp, **options)


@pytest.mark.parametrize(
    "model_type, overrides, tp, options",
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, 2, {"audit_every": 1}),
        ("gpt2", {"n_head": 6, "n_inner": 77}, 4, {"sequence_parallel": True}),
        ("gptj", {}, 2, {"fuse": True}),
        ("mixtral", {}, 2, {"expert_parallel": True}),
        ("olmo2", {}, 2, {}),
        ("t5", {}, 2, {}),
    ],
)
def test_training(model_type: str, overrides: dict[str, Any], tp: int, options: dict[str, Any]) -> None:
    assert_parity(run(tp, checked_parity, model_type, overrides, tp, options))


def script_case() -> bool:
    """Run on every rank: adapters, and what scripts do with logits and weights."""
    fresh()
    with checked():
        model = adapted(build(config_for("llama")), "lora")
        tp_plugin.parallelize(model, tp_size=2)
        output = model(**batch(97, 0))
        logits = output.logits
        best, probabilities = logits.argmax(-1), logits.softmax(-1)
        (output.loss + probabilities.max(-1).values.mean() + logits.topk(3, -1).values.mean()).backward()
        with tp_plugin.full_parameters(model):
            pass
        model.state_dict()
    return best.dtype == torch.int64


def test_scripts() -> None:
    assert run(2, script_case) == [True, True]


def refused_case(what: str) -> None:
    fresh()
    group = Group("tp", [0, 1], torch.distributed.group.WORLD)
    with checked():
        if what == "objects":
            group.gather_objects(1)
        else:
            group.all_gather(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("what", ["objects", "torch.int64"])
def test_what_is_refused(what: str) -> None:
    with pytest.raises(WorkerError, match=f"of {what} in the tp group"):
        run(2, refused_case, what)
