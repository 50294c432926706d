"""DeepSpeed configs that are incompatible with `tp_size` are refused on every rank, by the key; nobody hangs."""

from __future__ import annotations

import json

import pytest

from .zero import accelerate, direct

# changes to a config for 4 processes, and what the message has to speak of
BAD = {
    "three": ({"tp_size": 3}, ["tp_size", "3", "4"]),
    "words": ({"tp_size": "two"}, ["tp_size", "two"]),
    "none": ({"tp_size": 0}, ["tp_size", "0"]),
    "negative": ({"tp_size": -2}, ["tp_size", "-2"]),
    "nested": ({"zero_optimization": {"stage": 1, "tp_size": 2}}, ["zero_optimization.tp_size", "top level"]),
    "autotp": ({"tp_size": 2, "tensor_parallel": {"autotp_size": 2}}, ["autotp_size", "tp_size"]),
    "hpz": (
        {"tp_size": 2, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        ["zero_hpz_partition_size"],
    ),
    "mics": ({"tp_size": 2, "zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size", "tp_size"]),
    "ulysses": ({"tp_size": 2, "sequence_parallel_size": 2}, ["sequence_parallel_size", "tp_size"]),
    "lamb": ({"tp_size": 2, "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, ["Lamb", "tp_size"]),
    "unknown": ({"tp_size": 2, "tp_plugin": {"polcy": "x"}}, ["tp_plugin", "polcy"]),
}


@pytest.fixture(scope="module")
def refused(bench, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    for number, (name, (changes, _)) in enumerate(BAD.items()):  # tried in this order; only the first has no mesh yet
        (folder / f"{number:02d}-{name}.json").write_text(json.dumps(direct(1) | changes))
    args = ("--models", str(checkpoints["llama"].parent), "--configs", str(folder))
    return bench.run("zero_refused", 4, 1, args, entry="zero torchrun", timeout=120)


@pytest.mark.parametrize("how", ["by_accelerate", "by_trainer", "by_initialize"])
@pytest.mark.parametrize("name", BAD)
def test_config_in_the_code(refused, name, how):
    for rank, own in enumerate(refused.ranks):
        message = own[f"{name} {how}"]
        assert message, f"accepted on rank {rank}"
        assert message.startswith("TPError"), message
        assert all(word in message for word in BAD[name][1]), message


AT_LAUNCH = {
    # the JSON's changes, the YAML's, what one line of the output has to speak of
    "two places": ({"tp_size": 2}, {"tp_size": 4}, ["tp_size", "2", "4", "one place"]),
    "autotp": ({"tensor_parallel": {"autotp_size": 2}}, {"tp_size": 2}, ["autotp_size", "tp_size"]),
    "three": ({"tp_size": 3}, {}, ["tp_size", "3", "num_processes", "4"]),
    "nested in YAML": ({}, {"deepspeed_config": {"tp_size": 2}}, ["deepspeed_config.tp_size", "top level"]),
}


@pytest.mark.parametrize("case", AT_LAUNCH)
def test_before_anything_starts(bench, checkpoints, tmp_path, case):
    inner, outer, words = AT_LAUNCH[case]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(accelerate(2) | inner))
    config = outer | {"deepspeed_config": {"deepspeed_config_file": str(path)} | outer.get("deepspeed_config", {})}
    args = ("--models", str(checkpoints["llama"].parent))
    run = bench.launch("reached", 4, 1, args, entry="zero accelerate", config=config, timeout=60)
    assert run.code != 0, f"accepted\n{run.tail()}"
    assert not list(run.out.glob("rank*.json")), "the script got its model before anybody objected"
    lines = [line for line in run.output.splitlines() if all(word in line for word in words)]
    assert lines, f"no line names {words}\n{run.tail()}"
