"""What a rank reads and holds of mapped files when the model is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory import LiveBytes
from models import build, config_for
from test_loading import DTYPES, MODELS, load, patched, saved_models
from torch import nn
from workers import run

from tp_plugin.config.resolve import current_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved_models(tmp_path_factory)


def test_a_row_split_touches_no_foreign_page(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tp_plugin.policy import ParamLayout
    from tp_plugin.shard import lazy_load, mapped_file

    rows = 4096  # of 1 KB
    save_file({"w": torch.arange(rows * 256, dtype=torch.float32).view(rows, 256)}, tmp_path / "x.safetensors")
    found = mapped_file.open_checkpoint(tmp_path / "x.safetensors")
    assert found is not None
    weight = found["w"]
    for dim, layout in enumerate([
        ParamLayout((rows, 256), 0, (((0, 1024),), ((1024, 4096),))),
        ParamLayout((rows, 256), 1, (((0, 128),), ((128, 256),))),
    ]):  # fmt: skip
        before = _read_so_far()
        local = lazy_load.read_shard(weight, layout, 0)
        taken = (local, weight)[dim]  # short pieces are cut out of whole rows
        assert 0 <= _read_so_far() - before - taken.nbytes < 200_000  # and what this test reads in /proc
        assert mapped_file.pages_read(weight) == 0
        whole = torch.arange(rows * 256, dtype=torch.float32).view(rows, 256)
        assert torch.equal(local, whole.narrow(dim, 0, (1024, 128)[dim]))
    weight[0, 0] = 5.0  # from now on the file is not asked
    assert lazy_load.read_shard(weight, layout, 0)[0, 0] == 5.0
    assert mapped_file.pages_read(weight) > 0


def _read_so_far() -> int:
    with open("/proc/self/io", encoding="ascii") as io_of_process:
        return next(int(line.split()[1]) for line in io_of_process if line.startswith("rchar"))


def sharded_case(folder: str, dtype: torch.dtype | None, optimizer_first: bool) -> dict[str, Any]:
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import lazy_load, mapped_file, parallelize

    stop()
    plain = load(folder, dtype)
    with patched():
        mapped_file.read_bytes.clear()
        lazy = load(folder, dtype)
        optimizer = torch.optim.AdamW(lazy.parameters(), lr=1e-2) if optimizer_first else None
        ids = {name: id(p) for name, p in lazy.named_parameters()}
        parallelize(lazy, 2)
        taken = dict(mapped_file.read_bytes)
    assert {name: id(p) for name, p in lazy.named_parameters()} == ids
    rank = torch.distributed.get_rank()
    layouts = lazy.tp_record.plan.layouts
    share = 0
    size = plain.dtype.itemsize if dtype is None else 4
    for name, parameter in lazy.named_parameters():
        expected = layouts[name].shard(plain.get_parameter(name).data, rank)
        assert type(parameter) is nn.Parameter and torch.equal(parameter, expected), name
        assert not lazy_load.is_mapped(parameter)
        share += parameter.numel() * size
    if optimizer is not None:
        batch = torch.arange(12).view(2, 6)
        lazy(batch, labels=batch).loss.backward()
        optimizer.step()
        for name, parameter in lazy.named_parameters():  # of the embedding, only rows in the batch move
            still = torch.equal(parameter, layouts[name].shard(plain.get_parameter(name).data, rank))
            assert not still or parameter.dim() == 1 or "embed" in name, name
    left = [name for name, p in lazy.named_parameters() if isinstance(p, lazy_load.LazyParameter)]
    return {"taken": taken, "share": share, "whole": sum(p.numel() * size for p in plain.parameters()), "left": left}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(MODELS))
def test_each_rank_reads_its_share(folders: dict[str, str], name: str, dtype: torch.dtype | None) -> None:
    for case in run(2, sharded_case, folders[name], dtype, name == "llama"):
        taken = sum(case["taken"].values())
        assert not case["left"]
        if name != "mixtral":  # the experts of its files are merged by transformers, whole
            assert taken <= 1.05 * case["share"] < 0.7 * case["whole"], case
            assert case["taken"].get("cast", 0) == 0


def changed_case(folder: str, dtype: torch.dtype | None) -> bool:
    """One rank changed a weight before prepare: the leader's count, as ever."""
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    plain = load(folder, dtype)
    with patched():
        lazy = load(folder, dtype)
        for model in (plain, lazy):
            model.lm_head.weight.data[900] = 5.0  # a row of rank 1
        if torch.distributed.get_rank() == 1:
            lazy.lm_head.weight.data[901] = 6.0
            lazy.model.embed_tokens.weight.data.zero_()
        parallelize(lazy, 2)
    rank = torch.distributed.get_rank()
    layouts = lazy.tp_record.plan.layouts
    return all(
        torch.equal(p, layouts[name].shard(plain.get_parameter(name).data, rank)) for name, p in lazy.named_parameters()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_agree_also_when_one_has_written(folders: dict[str, str], dtype: torch.dtype | None) -> None:
    assert run(2, changed_case, folders["llama"], dtype) == [True, True]


def copies_case(folder: str, other: str) -> bool:
    """Each rank has files of its own (as on two hosts), and they differ."""
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    plain = load(folder)
    rank = torch.distributed.get_rank()
    with patched():
        lazy = load((folder, other)[rank])
        parallelize(lazy, 2)
    layouts = lazy.tp_record.plan.layouts
    return all(
        torch.equal(p, layouts[name].shard(plain.get_parameter(name).data, rank)) for name, p in lazy.named_parameters()
    )


def test_files_that_differ_between_hosts_are_noticed(folders: dict[str, str], tmp_path: Path) -> None:
    model = load(folders["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(tmp_path)
    assert run(2, copies_case, folders["llama"], str(tmp_path)) == [True, True]


def memory_case(folder: str, dtype: torch.dtype | None) -> dict[str, int]:
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import lazy_load, parallelize

    stop()
    with patched():
        parallelize(load(folder, dtype), 2)  # imports, groups, caches of the allocator
        stop()
        before = _memory("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")
        model = load(folder, dtype)
        parallelize(model, 2)
    assert not any(lazy_load.is_mapped(p) for p in model.parameters())
    sizes = [p.nbytes for p in model.parameters()]
    return {"peak": _memory("VmHWM") - before, "share": sum(sizes), "largest": 2 * max(sizes)}


def _memory(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_host_holds_a_share_and_the_largest_tensor(tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = config_for(
        "llama", hidden_size=512, intermediate_size=2048, vocab_size=12000, num_hidden_layers=4, num_key_value_heads=4
    )
    build(config, 0).save_pretrained(tmp_path)  # 128 MB
    for case in run(2, memory_case, str(tmp_path), dtype):
        assert case["peak"] <= case["share"] + case["largest"] + 8e6 < 1.1 * 2 * case["share"], case


def loaded_once_case(folder: str, way: str) -> dict[str, Any]:
    """FSDP's RAM-efficient loading: the world's first rank has the weights, the others room for them."""
    from counted import ledger

    from tp_plugin.runtime.start import start, stop
    from tp_plugin.shard import lazy_load, parallelize
    from tp_plugin.shard.mapped_file import pages_read

    stop()
    rank = torch.distributed.get_rank()
    plain = load(folder)
    with patched():
        model = load(folder)
        if way == "rooms" and rank > 0:
            for parameter in model.parameters():
                lazy_load.materialize_(parameter, torch.zeros(parameter.shape))
        elif rank == 0 and way == "changed":
            for one in (plain, model):
                one.lm_head.weight.data[900] = 5.0
        elif way == "changed":
            plain.lm_head.weight.data[900] = 5.0
        sources = [p.detach() for p in model.parameters() if lazy_load.is_mapped(p)]
        start(current_config(), 2)
        with LiveBytes(known=(*model.parameters(), *model.buffers())) as memory:
            parallelize(model, 2, loaded_once=True)
    layouts = model.tp_record.plan.layouts
    for name, parameter in model.named_parameters():
        expected = layouts[name].shard(plain.get_parameter(name).data, rank % 2)
        assert type(parameter) is nn.Parameter and torch.equal(parameter, expected), name
        assert not lazy_load.is_mapped(parameter)
    sizes = [p.nbytes for p in plain.parameters()]
    return {
        "peak": memory.peak, "share": sum(p.nbytes for p in model.parameters()), "largest": max(sizes),
        "whole": sum(sizes), "count": dict(ledger["count"]), "bytes": dict(ledger["bytes"]),
        "seen": sum(map(pages_read, sources)),
    }  # fmt: skip


@pytest.mark.parametrize("way", ["mapped", "changed", "rooms"])
def test_what_one_rank_loaded_is_spread_by_shares(folders: dict[str, str], way: str) -> None:
    cases = run(4, loaded_once_case, folders["llama"], way)
    for rank, case in enumerate(cases):
        # beside the share, one whole tensor in the leader's unit, and a share of it on its way to the others
        assert case["peak"] <= case["share"] + 1.5 * case["largest"] < case["whole"], case
        sent = case["count"].get("broadcast/data", 0)
        assert sent == {"mapped": 0, "changed": 1, "rooms": sent}[way]
        if way == "rooms":
            assert sent > 20 and case["bytes"]["broadcast/data"] <= case["share"]
        whole = case["bytes"].get("broadcast/unit_cpu", 0)
        assert whole == 0 if rank > 1 or way == "mapped" else 0 < whole <= case["whole"]
        assert case["seen"] == 0 or way != "mapped"
