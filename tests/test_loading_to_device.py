"""A model that lies in its file and is sent to a device before ``prepare``: it looks whole there, and a share goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, Card
from fresh import scripts
from test_loading import DTYPES, assert_equal, load, patched, saved_models, unread
from torch import nn
from workers import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved_models(tmp_path_factory)


def mapped(folder: str, way: str, dtype: torch.dtype | None = None) -> Any:
    """The model, sent to the card as a script does."""
    if way == "device_map":
        return load(folder, dtype, device_map={"": CARD})
    model = load(folder, dtype)
    model.cuda(0) if way == "cuda" else model.to(CARD)
    return model


WAYS = ["to", "cuda", "device_map"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_it_says_that_it_is_there_and_is_not(folders: dict[str, str], way: str, dtype: torch.dtype | None) -> None:
    plain = load(folders["llama"], dtype)
    with patched(), Card() as card:
        lazy = mapped(folders["llama"], way, dtype)
        assert lazy.device == CARD and lazy.dtype == plain.dtype
        names = [name for name, p in plain.named_parameters() if p.nbytes >= 4096]
        large = [lazy.get_parameter(name) for name in names]
        assert all(p.device == CARD and p.is_cuda and not p.is_cpu and p.get_device() == 0 for p in large)
        assert unread(lazy) == sum(p.nbytes for p in large) > 10 * sum(card.sent)
        again = [id(p) for p in lazy.parameters()]
        lazy.to(CARD)
        torch.optim.AdamW(lazy.parameters())
        lazy.requires_grad_(False)
        assert [id(p) for p in lazy.parameters()] == again
        assert unread(lazy) == sum(p.nbytes for p in large) > 10 * sum(card.sent)
        assert_equal(lazy, plain)  # which reads, and reads right
        assert card.live >= sum(p.nbytes for p in large)
        assert all(type(p) is nn.Parameter for p in lazy.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_comes_back_and_is_cast_on_the_way(folders: dict[str, str], dtype: torch.dtype | None) -> None:
    plain = load(folders["llama"], dtype)
    with patched(), Card() as card:
        lazy = mapped(folders["llama"], "to", dtype)
        before = unread(lazy)
        lazy.to("cpu")
        assert unread(lazy) == before > 0 and lazy.device.type == "cpu"
        lazy.to(CARD, torch.float16)
        assert lazy.dtype == torch.float16
        assert (unread(lazy) > 0) == (dtype is None)  # two casts are not one
        assert_equal(lazy, plain.half())
        assert card.live > 0


def test_one_that_is_used_before_it_is_prepared_is_read_there(folders: dict[str, str]) -> None:
    plain, ids = load(folders["llama"]), torch.arange(12).view(2, 6)
    with patched(), Card() as card:
        lazy = mapped(folders["llama"], "to")
        logits = lazy(ids).logits
    assert torch.equal(logits, plain(ids).logits)
    assert card.live >= sum(p.nbytes for p in plain.parameters())
    assert all(type(p) is nn.Parameter for p in lazy.parameters())


def sharded_case(folder: str, way: str, dtype: torch.dtype | None, other: str | None) -> dict[str, Any]:
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import mapped_file, parallelize

    stop()
    plain = load(folder, dtype)
    rank = torch.distributed.get_rank()
    with patched(), Card() as card:
        lazy = mapped(other if other and rank else folder, way, dtype)
        sources = [p.source for p in lazy.parameters() if hasattr(p, "source")]
        parallelize(lazy, 2)
        seen = sum(mapped_file.pages_read(source) for source in sources)
    layouts = lazy.tp_record.plan.layouts
    for name, parameter in lazy.named_parameters():
        assert torch.equal(parameter, layouts[name].shard(plain.get_parameter(name).data, rank)), name
    sizes = [p.nbytes for p in plain.parameters()]
    small = sum(size for size in sizes if size < 4096)  # these are not mapped: they went there whole
    share = sum(p.nbytes for p in lazy.parameters())
    return {"peak": card.peak, "share": share + small, "largest": max(sizes), "whole": sum(sizes), "seen": seen}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prepare_sends_a_share(folders: dict[str, str], name: str, way: str, dtype: torch.dtype | None) -> None:
    for case in run(2, sharded_case, folders[name], way, dtype, None):
        assert case["peak"] <= case["share"] + case["largest"] < case["whole"], case
        assert case["seen"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_that_differ_are_compared_in_host_memory(
    folders: dict[str, str], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Each host has files of its own: all tensors are compared, the one that differs is sent."""
    model = load(folders["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(tmp_path)
    for case in run(2, sharded_case, folders["llama"], "to", dtype, str(tmp_path)):
        assert case["peak"] <= case["share"] + 2 * case["largest"] < case["whole"], case


def trainer_case(folder: str, output: str) -> None:
    import unittest.mock

    import transformers

    from tp_plugin.shard.lazy_load import LazyParameter

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sizes = [p.nbytes for p in model.parameters()]
    device = unittest.mock.PropertyMock(return_value=CARD)
    arguments = transformers.TrainingArguments(output, report_to=[], use_cpu=True)
    with unittest.mock.patch.object(transformers.TrainingArguments, "device", device), Card() as card:
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=[{"input_ids": [1, 2]}])
        assert any(isinstance(p, LazyParameter) for p in model.parameters()) and card.peak < 0.1 * sum(sizes)
        trainer.create_optimizer()  # reads names and shapes
        trainer.accelerator.prepare(trainer.model)
    share = trainer.model.tp_record.runtime.held_bytes  # parameters look whole to this script
    assert share < 0.7 * sum(sizes)
    assert card.peak <= share + max(sizes), (card.peak, share)


def test_trainer_leaves_the_whole_model_in_its_file(folders: dict[str, str], tmp_path: Path) -> None:
    for ended in scripts(2, trainer_case, folders["llama"], str(tmp_path), folder=tmp_path):
        assert ended.code == 0, ended.said


def test_row_parallel_weights_are_read_in_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from tp_plugin.policy import ParamLayout
    from tp_plugin.shard import lazy_load, mapped_file

    rows, width = 6000, 1024  # of 4 KB; a rank has 2 KB of each
    whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    save_file({"w": whole}, tmp_path / "x.safetensors")
    weight = (mapped_file.open_checkpoint(tmp_path / "x.safetensors") or {})["w"]
    calls: list[int] = []
    read = mapped_file.File.read
    monkeypatch.setattr(
        mapped_file.File, "read", lambda self, into, offset: (calls.append(len(into)), read(self, into, offset))
    )
    for ranges in ([((0, 512),), ((512, 1024),)], [((0, 100), (700, 701)), ((100, 700), (701, 1024))]):
        layout = ParamLayout((rows, width), 1, tuple(ranges))
        for rank in range(2):
            calls.clear()
            assert torch.equal(lazy_load.read_shard(weight, layout, rank), layout.shard(whole, rank))
            assert len(calls) == math.ceil(weight.nbytes / lazy_load.BLOCK) and sum(calls) == weight.nbytes
    assert mapped_file.pages_read(weight) == 0


def test_a_written_or_zero_sized_one_is_taken_from_memory(folders: dict[str, str]) -> None:
    plain = load(folders["llama"])
    with patched(), Card():
        lazy = load(folders["llama"])
        for model in (plain, lazy):
            model.lm_head.weight.data[900] = 5.0
        lazy.to(CARD)
        assert_equal(lazy, plain)
