"""Data loaders, collective operations, process control and logging: a TP group is one process."""

from __future__ import annotations

import pytest

from .compare import as_processes, peers_agree

LAYOUTS = [pytest.param((2, 1), marks=pytest.mark.full), (2, 2)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda c: f"tp{c[0]}dp{c[1]}")
def runs(request, bench):
    tp, dp = request.param
    return bench.run(["ops", "loaders"], tp, dp), bench.run(["ops", "loaders"], 1, dp)


@pytest.fixture
def loaders(runs):
    return [run.of("loaders") for run in runs]


@pytest.fixture
def ops(runs):
    return [run.of("ops") for run in runs]


def test_ranks_of_a_group_get_the_same_batches(loaders):
    """Also without a seed, and also what a random collator drew."""
    peers_agree(loaders[0], ["process", "seen"], tolerance=0)


def test_unseeded_groups_share_the_data_set(loaders):
    run, plain = loaders
    leaders = [run.ranks[group[0]]["seen"] for group in run.layout.groups()]
    for name in plain.ranks[0]["unseeded"]:
        expected = plain.ranks[0]["seen"][name]
        for own in leaders:
            for key in ("length", "total_batch_size"):
                assert own[name][key] == expected[key], f"{name}, {key}"
            assert own[name]["ends"] == expected["ends"], f"{name}: end of loader, remainder"
            assert len(own[name]["counted"]) == len(expected["counted"]), name
            if name != "unseeded seedable sampler":  # there, plain processes overlap as well
                assert set(own[name]["counted"]) == set(expected["counted"]), name
        noises = [tuple(batch["torch"][0] for batch in own[name]["batches"]) for own in leaders]
        samples = [[batch["id"] for batch in own[name]["batches"]] for own in leaders]
        if run.layout.dp == 2:
            assert noises[0] != noises[1] and samples[0] != samples[1], f"{name}: both groups got the same"


def test_unseeded_is_not_secretly_seeded(loaders):
    """Two unseeded shuffles that agree would mean that somebody fixed the seed."""
    seen = loaders[0].ranks[0]["seen"]
    orders = [[b["id"] for b in seen[n]["batches"]] for n in ("unseeded shuffled", "unseeded shuffled, workers")]
    plain = [b["id"] for b in loaders[1].ranks[0]["seen"]["unseeded shuffled"]["batches"]]
    assert orders[0] != orders[1] and orders[0] != plain


def test_seeded_is_exactly_the_plain_run(loaders):
    """Same samples, same noise, and the generators stand where they stand in the plain run."""
    run, plain = loaders
    for who, own, process in as_processes(run, plain):
        for name in process["seeded"]:
            for key, expected in process["seen"][name].items():
                assert own["seen"][name][key] == expected, f"{who}, {name}: {key}"


def test_collectives_are_over_processes(ops):
    for who, own, process in as_processes(*ops):
        for part in ("collectives", "splits"):
            for name, expected in process[part].items():
                assert own[part][name] == expected, f"{who}, {name}"


def test_process_control(ops):
    run, plain = ops
    world = len(run.ranks)
    for who, own, process in as_processes(run, plain):
        for name in ("num_processes", "process_index", "triggered", "main was first", "local main was first"):
            assert own["control"][name] == process["control"][name], f"{who}, {name}"
        assert own["control"]["waited for"] == [str(r) for r in range(world)], f"{who}: the barrier leaks"
    assert [own["control"]["local_process_index"] for own in run.ranks] == list(range(world))
    assert [own["control"]["main"] for own in run.ranks] == [True] + [False] * (world - 1)


def test_side_effects_happen_once(ops):
    """What a script does "on one process" is done by one rank of the world, not by a whole TP group."""
    run, _ = ops
    calls = [path.name.split(".") for path in (run.out / "calls").iterdir()]
    by_what = {what: [int(rank) for name, rank in calls if name == what] for what, _ in calls}
    mains = ["on_main_process", "on_local_main_process", "is_main_process", "is_local_main_process", "on_process"]
    for what in mains:
        assert by_what[what] == [0], f"{what} on ranks {by_what[what]}"
    for what in ("on_last_process", "is_last_process"):
        assert len(by_what[what]) == 1, f"{what} on ranks {by_what[what]}"
        assert by_what[what][0] in run.layout.groups()[-1], f"{what} on rank {by_what[what]}"


def test_main_process_logs_once(ops):
    run, _ = ops
    for line in ("LOGGED BY MAIN", "PRINTED BY MAIN"):
        assert run.output.count(line) == 1, line
    assert "LOGGED IN ORDER" in run.output
