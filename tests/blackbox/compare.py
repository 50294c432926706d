"""Section 7's numbers, as assertions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LOSS = 1e-5  # relative
NORM = 1e-5  # relative
WEIGHTS = 3e-4  # absolute, after six AdamW steps
GRADIENT = 1e-4  # relative in norm


def close(got, expected, tolerance: float, what: str) -> None:
    """Compare nested lists and numbers; None only equals None."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), f"{what}: keys {sorted(got)} instead of {sorted(expected)}"
        for key in expected:
            close(got[key], expected[key], tolerance, f"{what}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{what}: {len(got)} instead of {len(expected)} entries"
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            close(a, b, tolerance, f"{what}[{i}]")
    elif isinstance(expected, float) and isinstance(got, float):
        assert math.isclose(got, expected, rel_tol=tolerance), f"{what}: {got!r} instead of {expected!r}"
    else:
        assert got == expected, f"{what}: {got!r} instead of {expected!r}"


def same(got: dict, expected: dict, keys: list[str], what: str) -> None:
    for key in keys:
        assert got[key] == expected[key], f"{what}, {key}: {got[key]!r} instead of {expected[key]!r}"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def tensors_close(got: dict, expected: dict, tolerance: float, what: str) -> None:
    assert list(got) == list(expected), f"{what}: other keys: {set(got) ^ set(expected)}, or another order"
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, f"{what}, {name}: {got[name].dtype}"
        assert got[name].shape == tensor.shape, f"{what}, {name}: {tuple(got[name].shape)}"
        difference = (got[name].double() - tensor.double()).abs().max().item()
        assert difference <= tolerance, f"{what}, {name}: off by {difference:.2e}"


def checkpoints_equal(got: Path, expected: Path, tolerance: float = WEIGHTS) -> None:
    """An ordinary checkpoint: the same files, keys and shapes, and plain transformers loads it without a word."""
    assert files(got) == files(expected)
    for name in files(expected):
        if name.endswith((".safetensors", ".pt", ".bin")):
            tensors_close(tensors_in(got / name), tensors_in(expected / name), tolerance, f"{got.name}/{name}")
        elif name.endswith(".json"):
            assert (got / name).read_text() == (expected / name).read_text(), name
    if (expected / "config.json").exists():
        model, info = AutoModelForCausalLM.from_pretrained(got, output_loading_info=True)
        assert not any(info.values()), info
        tensors_close(
            model.state_dict(), AutoModelForCausalLM.from_pretrained(expected).state_dict(), tolerance, "reloaded"
        )


def as_processes(run, plain):
    """Each rank beside the plain process that its TP group stands for: its name, its report, the process's report."""
    for process, group in enumerate(run.layout.groups()):
        for rank in group:
            yield f"rank {rank} at {run.layout}", run.ranks[rank], plain.ranks[process]


def section_of(run, plain, section: str):
    """The same for one section of a script's report, which neither of them failed in."""
    for who, own, process in as_processes(run, plain):
        got, expected = dict(own[section]), dict(process[section])
        assert "failed" not in expected, f"the plain run failed:\n{expected['failed']}"
        assert "failed" not in got, f"{who} failed:\n{got['failed']}"
        assert got.keys() == expected.keys()
        yield f"{section}, {who}", got, expected


def peers_agree(run, keys: list[str], tolerance: float = 1e-6) -> None:
    """Ranks of a TP group observed the same."""
    for group in run.layout.groups():
        for peer in group[1:]:
            for key in keys:
                first = run.ranks[group[0]][key]
                close(run.ranks[peer][key], first, tolerance, f"{key} on rank {peer}, not as on its peer {group[0]}")
