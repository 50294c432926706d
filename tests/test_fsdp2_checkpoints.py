"""FSDP2 x TP: checkpoints move between layouts; meshes that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from test_fsdp2 import FULL, REPLICATED_KV, _install, make, new_optimizer, step
from workers import run


def save(tp: int, model: tuple[str, dict[str, Any]], folder: str, steps: int) -> Any:
    """Train, save model and optimizer as DCP and as full state dicts, train on; the later losses and norms."""
    _install()  # before the names below are imported
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    network, config = make(tp, *model)
    optimizer = new_optimizer(network)
    for number in range(steps):
        step(network, optimizer, config.vocab_size, tp, number, False)
    with torch.no_grad():
        network(**batch(config.vocab_size, seed=0))  # leaves the root's parameters gathered
    state = {"model": get_model_state_dict(network), "optimizer": get_optimizer_state_dict(network, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(network, options=options), get_optimizer_state_dict(network, optimizer, options=options)
    direct = network.state_dict() if tp > 1 else {}
    if torch.distributed.get_rank() == 0:
        torch.save(full, f"{folder}/full.pt")
        assert all(torch.equal(direct[name], tensor) for name, tensor in full[0].items() if direct)
    else:
        assert full == ({}, {})
    rest = [step(network, optimizer, config.vocab_size, tp, steps + more, False) for more in range(2)]
    return [(seen["losses"], seen["norm"]) for seen in rest]


def resume(tp: int, model: tuple[str, dict[str, Any]], folder: str, steps: int, full: bool) -> Any:
    _install()  # before the names below are imported
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    network, config = make(tp, *model, seed=5)
    optimizer = new_optimizer(network)
    if full:
        on_first = torch.distributed.get_rank() == 0
        states = torch.load(f"{folder}/full.pt", weights_only=True) if on_first else ({}, {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        options = StateDictOptions()
        state = {"model": get_model_state_dict(network), "optimizer": get_optimizer_state_dict(network, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        states = state["model"], state["optimizer"]
    set_model_state_dict(network, states[0], options=options)
    set_optimizer_state_dict(network, optimizer, states[1], options=options)
    rest = [step(network, optimizer, config.vocab_size, tp, steps + more, False) for more in range(2)]
    return [(seen["losses"], seen["norm"]) for seen in rest]


@pytest.mark.parametrize("model", [REPLICATED_KV, pytest.param(("gpt2", {}), marks=FULL)], ids=["llama", "gpt2"])
def test_checkpoints_move_between_layouts(tmp_path: Path, model: Any) -> None:
    """Saved at tp 2 x dp 2, by all ranks; resumed there, at tp 4, at tp 2, and by plain FSDP2; and the way back."""

    def check(found: Callable[[], Any], tp: int, expected: list[Any]) -> None:
        for rank, seen in enumerate(found()):
            for (losses, norm), (want, want_norm) in zip(seen, expected[rank // tp], strict=True):
                assert losses == pytest.approx(want, rel=1e-5)
                assert norm == pytest.approx(want_norm, rel=1e-5)

    for name in ("plain", "tp"):
        (tmp_path / name).mkdir()
    expected = run(2, save, 1, model, str(tmp_path / "plain"), 2)
    check(lambda: run(4, save, 2, model, str(tmp_path / "tp"), 2), 2, expected)
    whole, parts = (torch.load(tmp_path / name / "full.pt", weights_only=True) for name in ("plain", "tp"))
    assert list(whole[0]) == list(parts[0]) and list(whole[1]["state"]) == list(parts[1]["state"])
    for name, tensor in whole[0].items():
        torch.testing.assert_close(parts[0][name], tensor, rtol=0, atol=3e-4)
    assert list((tmp_path / "tp" / "dcp").glob("__3_*.distcp")), "rank 3 wrote nothing"
    for full in (False, True):
        for origin, tp, dp in (("tp", 2, 2), ("tp", 1, 2), ("plain", 2, 2)):
            check(lambda: run(tp * dp, resume, tp, model, str(tmp_path / origin), 2, full), tp, expected)  # noqa: B023
    alone = run(1, resume, 1, model, str(tmp_path / "plain"), 2, False)
    for full in (False, True):
        check(lambda: run(4, resume, 4, model, str(tmp_path / "tp"), 2, full), 4, alone)  # noqa: B023


def refusals(tp: int) -> list[str]:
    import torch.distributed.fsdp
    from torch.distributed.device_mesh import init_device_mesh

    from tp_plugin import TPError, parallelize
    from tp_plugin.runtime.start import stop

    stop()
    _install()
    model = parallelize(build(config_for("llama")), tp_size=tp)
    world = torch.distributed.get_world_size()
    said = []
    for mesh in (init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))):
        try:
            torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        except TPError as error:
            said.append(str(error))
    return said


def test_another_mesh_is_refused() -> None:
    for said in run(2, refusals, 2):
        assert len(said) == 2 and all("leave out mesh" in message for message in said)
